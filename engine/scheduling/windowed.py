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

    def __init__(
        self, pool: PagePool, cold: ColdIndex, windows: WindowPages, *, enabled: bool
    ) -> None:
        super().__init__(pool, cold, enabled=enabled)
        self.windows = windows

    def known_pages(self, sequence: Sequence, *, held: bool = False, cold: bool = False) -> int:
        if not self.shares(sequence):
            return 0
        size = self.pool.page_size
        count = min(self._deepest(sequence, 0), (len(sequence.tokens) - 1) // size)
        if not held:
            return count
        names = (sequence.page_hash(number, size) for number in range(count))
        return next((n for n, name in enumerate(names) if not self.pool.is_held(name)), count)

    def catch_up(self, sequence: Sequence) -> bool:
        size, length = self.pool.page_size, len(sequence.tokens)
        if not self.shares(sequence):
            return True
        while sequence.scheduled % size == 0 and sequence.scheduled < length - 1:
            here = sequence.scheduled // size
            if sequence.name_of(here, length, size) in self._claims:
                return False
            depth = self._deepest(sequence, here)
            if depth == here or not self._take_over(sequence, here, depth):
                return True
        return True

    def extend(self, sequence: Sequence, count: int) -> bool:
        self._pass(sequence, self.windows.first(sequence.computed))
        if not super().extend(sequence, count):
            return False
        fresh = sequence.pages[len(sequence.window_pages) :]
        sequence.window_pages += [self.windows.beside(page) for page in fresh]
        return True

    def left(self, sequence: Sequence) -> None:
        self._pass(sequence, len(sequence.window_pages))

    def _is_known(self, name: bytes) -> bool:
        return self.pool.has_window(name)

    def _pass(self, sequence: Sequence, start: int) -> None:
        """A sequence's window has moved on: it does not need what lies beside earlier pages."""
        if start > sequence.window_start:
            self.windows.let_go(sequence.window_pages[sequence.window_start : start])
            sequence.window_start = start

    def _deepest(self, sequence: Sequence, here: int) -> int:
        """How many leading pages can be taken over by one that has `here` of them."""
        size, length = self.pool.page_size, len(sequence.tokens)
        best = whole = here
        for number in range(here, -(-length // size)):
            name = sequence.name_of(number, length, size)
            cold = self.cold.worth_restoring(name)
            if not self.pool.holds(name) and not cold:
                break
            if not self.pool.has_window(name) and not (cold and self.cold.is_whole(name)):
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
        pages, window_pages, shared = list[int](), list[int](), sequence.shared
        for number in range(here, depth):
            name = sequence.name_of(number, length, size)
            page, found = self._find(name, whole=number >= needed)
            if page is not None and found and (number + 1) * size > length:
                page = self._copy(page)  # it will go on in this page by itself
            elif found:
                shared = number + 1
            if page is None:
                self.windows.let_go(w for w in window_pages if w != NONE)
                self.pool.release(pages)
                return False
            pages.append(page)
            window_pages.append(self.windows.beside(page) if number >= needed else NONE)
        self._pass(sequence, min(needed, here))
        sequence.window_start = max(sequence.window_start, needed)
        sequence.pages += pages
        sequence.window_pages += window_pages
        sequence.shared = shared
        # The last token is always computed: its logits are what the step is for.
        skipped = min(end, length - 1) - sequence.scheduled
        sequence.scheduled += skipped
        if not sequence.preemptions:
            sequence.cached += skipped
        return True

    def _find(self, name: bytes, *, whole: bool) -> tuple[int | None, bool]:
        """The page of a name, `whole` with what lies beside it, and whether others have it, too; it
        is filled from the cold tier if need be. None if there is no room for that."""
        page = self.pool.acquire(name)
        if page is None:
            page = self._restore(name)
            found = False
        else:
            found = True
            if whole and self.windows.beside(page) != NONE:
                self.windows.hold(page)
                return page, True
        if page is not None and whole and not self._restore_window(name, page):
            self.pool.release([page])
            return None, False
        return page, found

    def _restore_window(self, name: bytes, page: int) -> bool:
        slot = self.cold.take(name)
        if slot is None or not self.cold.is_whole(name) or not self.windows.free:
            return False
        (window_page,) = self.windows.attach([page])
        self.moves.append((Move.RESTORE_WINDOW, slot, window_page))
        return True

    def _copy(self, page: int) -> int | None:
        fresh, window_page = super()._copy(page), self.windows.beside(page)
        if fresh is not None:
            self.moves.append((Move.COPY_WINDOW, window_page, self.windows.beside(fresh)))
        self.windows.let_go([window_page])
        return fresh

    def _evicted(self, page: int, names: tuple[bytes, ...], depth: int) -> None:
        super()._evicted(page, names, depth)
        window_page = self.windows.beside(page)
        if window_page != NONE and (slot := self.cold.complete(names[0])) is not None:
            self.moves.append((Move.DEMOTE_WINDOW, window_page, slot))
