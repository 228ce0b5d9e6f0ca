"""Sharing of pages where some layers see a window only: what lies beside a page may be gone.

A sequence can begin behind any page that is known, if all that its first token's window reaches is
still there; gaps before that do not matter.
"""

from __future__ import annotations

from engine.scheduling.cold import ColdIndex
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Move
from engine.scheduling.prefixes import Prefixes
from engine.scheduling.sequence import Sequence
from engine.scheduling.window_pages import NONE, WindowPages


class WindowedPrefixes(Prefixes):
    """Prefixes of models with windows; see `Prefixes`. Window pages are given up at once: steps run
    in order, so whoever gets one next writes it after the steps in flight have read it."""

    copies_beginnings = False
    # A name is found only while what lies beside its page is there.
    named_together = 1

    def __init__(
        self, pool: PagePool, cold: ColdIndex, windows: WindowPages, *, enabled: bool
    ) -> None:
        super().__init__(pool, cold, enabled=enabled)
        self.windows = windows

    def known_pages(self, sequence: Sequence, *, held: bool = False, cold: bool = False) -> int:
        if not self.shares(sequence):
            return 0
        most = (len(sequence.tokens) - 1) // self.pool.page_size
        if held:
            most = self._held(sequence, most)
        return self._deepest(sequence, 0, most)

    def catch_up(self, sequence: Sequence) -> bool:
        size, length = self.pool.page_size, len(sequence.tokens)
        if not self.shares(sequence):
            return True
        while sequence.scheduled % size == 0 and sequence.scheduled < length - 1:
            here = sequence.scheduled // size
            if sequence.name_of(here, length, size) in self._claims:
                return False
            # Who goes on within a page needs one of its own for that.
            most = -(-length // size) if self.pool.spare else length // size
            depth = self._deepest(sequence, here, most)
            if depth > here and self._take_over(sequence, here, depth):
                continue
            warm = self._deepest(sequence, here, most, cold=False) if depth > here else here
            if warm == here or not self._take_over(sequence, here, warm):
                return True
        return True

    def extend(self, sequence: Sequence, count: int) -> bool:
        self._pass(sequence, self.windows.first(sequence.computed))
        if not super().extend(sequence, count):
            return False
        fresh = sequence.pages[len(sequence.window_pages) :]
        sequence.window_pages += [self.windows.beside(page) for page in fresh]
        return True

    def publish(self, sequence: Sequence) -> None:
        super().publish(sequence)
        self._pass(sequence, self.windows.first(sequence.computed))

    def left(self, sequence: Sequence) -> None:
        self._pass(sequence, len(sequence.window_pages))

    def _is_known(self, name: bytes) -> bool:
        return self.pool.is_whole(name)

    def _pass(self, sequence: Sequence, start: int) -> None:
        """A sequence's window has moved on: it does not need what lies beside earlier pages."""
        if start > sequence.window_start:
            self.windows.let_go(sequence.window_pages[sequence.window_start : start])
            sequence.window_start = start

    def _deepest(self, sequence: Sequence, here: int, most: int, *, cold: bool = True) -> int:
        """How many leading pages, up to `most`, can be taken over by one that has `here` of them,
        also out of the `cold` tier."""
        size, length = self.pool.page_size, len(sequence.tokens)
        best = whole = here
        for number in range(here, most):
            name = sequence.name_of(number, length, size)
            restorable = cold and self.cold.worth_restoring(name)
            if not self.pool.holds(name) and not restorable:
                break
            kept = restorable and self.cold.slot_of_whole(name) is not None
            if not kept and not self.pool.is_whole(name):
                whole = number + 1
            # Its own pages behind `here` are whole as far as it needs them.
            if whole <= max(here, self._first(number + 1, length)):
                best = number + 1
        return best

    def _first(self, pages: int, length: int) -> int:
        """The first page that is seen by who goes on behind so many; the last token is always
        computed."""
        return self.windows.first(min(pages * self.pool.page_size, length - 1))

    def _take_over(self, sequence: Sequence, here: int, depth: int) -> bool:
        """Go on behind the first `depth` pages, of which it has `here`; False if there was no
        room."""
        size, length = self.pool.page_size, len(sequence.tokens)
        end, needed = min(depth * size, length), self._first(depth, length)
        names = [sequence.name_of(number, length, size) for number in range(here, depth)]
        # What is here is held before room is made for what is not.
        found = [self._hold(name, whole=n >= needed) for n, name in enumerate(names, here)]
        pages = list(found)
        missing = [n for n, page in enumerate(found) if page is None]
        windowed = sum(here + n >= needed for n in missing)
        if len(missing) <= self.pool.free and windowed <= self.windows.free:
            for n in missing:
                pages[n] = self._restored(names[n], whole=here + n >= needed)
            if end % size and found[-1] is not None:
                pages[-1] = self._copy(found[-1])  # it will go on in this page by itself
        taken = [page for page in pages if page is not None]
        beside = [
            NONE if page is None or n < needed else self.windows.beside(page)
            for n, page in enumerate(pages, here)
        ]
        if len(taken) < len(pages):
            self.windows.let_go(window_page for window_page in beside if window_page != NONE)
            self.pool.release(taken)
            return False
        self._pass(sequence, min(needed, here))
        sequence.window_start = max(sequence.window_start, needed)
        sequence.pages += taken
        sequence.window_pages += beside
        own = [here + n for n, page in enumerate(found) if page is not None and page == taken[n]]
        sequence.shared = own[-1] + 1 if own else sequence.shared
        # The last token is always computed: its logits are what the step is for.
        skipped = min(end, length - 1) - sequence.scheduled
        sequence.scheduled += skipped
        if not sequence.preemptions:
            sequence.cached += skipped
        return True

    def _hold(self, name: bytes, *, whole: bool) -> int | None:
        """The page of a name with a reference taken, `whole` with what lies beside it, if it is
        here."""
        if not (self.pool.is_whole(name) if whole else self.pool.holds(name)):
            return None
        page = self.pool.acquire(name)
        assert page is not None
        if whole:
            self.windows.hold(page)
        return page

    def _restored(self, name: bytes, *, whole: bool) -> int | None:
        """A page without a name that is filled from the cold tier; None if making room has pushed
        it out there."""
        page = self._restore(name)
        if page is None or not whole:
            return page
        slot = self.cold.slot_of_whole(name)
        if slot is None:
            self.pool.release([page])
            return None
        (window_page,) = self.windows.attach([page])
        self.moves.append((Move.RESTORE_WINDOW, slot, window_page))
        return page

    def _copy(self, page: int) -> int | None:
        window_page = self.windows.beside(page)
        fresh = super()._copy(page)
        if fresh is not None:
            self.moves.append((Move.COPY_WINDOW, window_page, self.windows.beside(fresh)))
        self.windows.let_go([window_page])
        return fresh

    def _evicted(self, page: int, names: tuple[bytes, ...], depth: int) -> int | None:
        slot, window_page = super()._evicted(page, names, depth), self.windows.beside(page)
        if window_page != NONE and (place := self.cold.complete(names[0], slot)) is not None:
            self.moves.append((Move.DEMOTE_WINDOW, window_page, place))
        return slot
