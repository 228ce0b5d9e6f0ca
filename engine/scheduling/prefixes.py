"""Sharing of computed pages: what a sequence can take over instead of computing it.

Nobody computes a page that another is computing or has computed: at every page boundary a prompt
looks for its next page, and waits a step if that is on its way. So requests that arrive together
with the same beginning, and the choices of one request, compute it once. What an answer adds can
be found some pages late, or once it has ended.
"""

from __future__ import annotations

from engine.scheduling.cold import ColdIndex
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Chunk, Move, Plan
from engine.scheduling.sequence import Sequence


class Prefixes:
    """Finds, claims and publishes pages. `moves` are those that the next step has to make, and
    `sources` the pages that have to stay until it has."""

    # Whether a page can be gone on from within, other than where a prompt has ended.
    copies_beginnings = True
    # Pages of an answer that are named at a time.
    named_together = 8

    def __init__(self, pool: PagePool, cold: ColdIndex, *, enabled: bool) -> None:
        self.pool = pool
        self.cold = cold
        self.enabled = enabled
        self.moves: list[tuple[Move, int, int]] = []
        self.sources: list[list[int]] = []
        # Whether moves wait that give memory back, and should not wait for a step's other reasons.
        self.urgent = False
        self._claims: set[bytes] = set()
        pool.on_evict = self._evicted

    def known_pages(self, sequence: Sequence, *, held: bool = False, cold: bool = False) -> int:
        """How many leading pages are in the pool just now, or are `held` there by somebody; also
        in the `cold` tier if that counts."""
        if not self.shares(sequence):
            return 0
        size, known = self.pool.page_size, self.pool.is_held if held else self.pool.holds
        count, most = 0, (len(sequence.tokens) - 1) // size
        while count < most:
            name = sequence.page_hash(count, size)
            if not known(name) and not (cold and self.cold.worth_restoring(name)):
                break
            count += 1
        return count

    def _held(self, sequence: Sequence, most: int) -> int:
        """How many of the first `most` pages somebody holds."""
        names = (sequence.page_hash(number, self.pool.page_size) for number in range(most))
        return next((n for n, name in enumerate(names) if not self.pool.is_held(name)), most)

    def shares(self, sequence: Sequence) -> bool:
        """Whether the sequence may use what others computed."""
        return self.enabled and not sequence.wants_prompt_logprobs

    def catch_up(self, sequence: Sequence) -> bool:
        """Take over pages from where the sequence stands. False if its next page is being computed
        by another, for which it should wait."""
        size, length = self.pool.page_size, len(sequence.tokens)
        if not self.shares(sequence):
            return True
        while sequence.scheduled % size == 0 and sequence.scheduled < length - 1:
            number = sequence.scheduled // size
            name = sequence.name_of(number, length, size)
            if name in self._claims:
                return False
            end = min((number + 1) * size, length)
            page = self.pool.acquire(name)
            if page is not None and end % size:
                page = self._copy(page)  # it will go on in this page by itself
            elif page is not None:
                sequence.shared = number + 1
            else:
                page = self._restore(name)
            if page is None:
                self._begin_alike(sequence)
                return True
            sequence.pages.append(page)
            # The last token is always computed: its logits are what the step is for.
            self._skip(sequence, min(end, length - 1) - sequence.scheduled)
        return True

    def extend(self, sequence: Sequence, count: int) -> bool:
        """Give a sequence so many more pages; False if there are too few."""
        fresh = self.pool.allocate(count)
        sequence.pages += fresh or []
        return fresh is not None

    def park(self, count: int) -> int:
        """Take about `count` free pages out of use and have their memory given back."""
        pages = self.pool.park(count)
        self.moves += [(Move.DISCARD, page, page) for page in pages]
        self.urgent = self.urgent or bool(pages)
        return len(pages)

    def take_moves(self) -> tuple[list[tuple[Move, int, int]], list[list[int]]]:
        """The moves that the next step has to make, and the pages that have to stay until then."""
        moves, sources = self.moves, self.sources
        self.moves, self.sources, self.urgent = [], [], False
        return moves, sources

    def moved(self, plan: Plan, seconds: float) -> float:
        """Learn from what a step's moves took; how many of the seconds do not belong to what it
        computed."""
        pages = sum(kind in (Move.RESTORE, Move.DEMOTE) for kind, _, _ in plan.moves)
        beside = any(kind in (Move.RESTORE_WINDOW, Move.DEMOTE_WINDOW) for kind, _, _ in plan.moves)
        if not pages and not beside:
            return 0.0
        self.cold.observe(seconds, max(1, pages))
        return seconds

    def forget(self) -> None:
        """Whatever was computed is gone, with the moves that were to come."""
        for pages in self.sources:
            self.pool.release(pages)
        self.sources, self.moves, self.urgent = [], [], False
        self.pool.forget()
        self.cold.clear()

    def claim(self, chunk: Chunk, plan: Plan) -> None:
        """Let others wait for the pages that a chunk of a plan computes."""
        sequence, size = chunk.sequence, self.pool.page_size
        if not self.shares(sequence) or not chunk.write:
            return
        end, length = chunk.start + chunk.count, len(sequence.tokens)
        pages = range(chunk.start // size, -(-end // size))
        names = (sequence.name_of(number, length, size) for number in pages)
        chunk.claims = tuple(name for name in names if not self._is_known(name))
        self._claims.update(chunk.claims)

    def retire(self, plan: Plan, *, done: bool) -> None:
        """A step has ended; it is `done`, or has failed."""
        for chunk in plan.chunks:
            if chunk.claims:
                self._claims.difference_update(chunk.claims)

    @property
    def states(self) -> tuple[int, int]:
        """States that are kept to be gone on from, and places for them."""
        return 0, 0

    def cut(self, sequence: Sequence, count: int) -> int:
        """How many of the next `count` tokens a step should take, so that what is to be kept of a
        state can be."""
        return count

    def grew(self, sequence: Sequence, plan: Plan) -> None:
        """A sequence that decodes is about to begin a page."""

    def filled(self, sequence: Sequence) -> None:
        """A sequence that decodes has filled a page. Some are named together, each sequence's in a
        step of its own: few go on from an answer before its end, and by the next page what names
        one has left the caches."""
        if (sequence.computed // self.pool.page_size + sequence.slot) % self.named_together == 0:
            self.publish(sequence)

    def left(self, sequence: Sequence) -> None:
        """A sequence has given up its slot."""

    def publish(self, sequence: Sequence) -> None:
        """Make pages findable whose every token has now been computed."""
        size = self.pool.page_size
        # A stop string cuts tokens off that have been computed.
        full = min(sequence.computed, len(sequence.tokens)) // size
        if self.enabled:
            for number in range(sequence.published, full):
                self._publish(sequence, number, (number + 1) * size)
        sequence.published = full

    def publish_tail(self, sequence: Sequence) -> None:
        """Name the page in which a prompt ends, as far as the prompt."""
        size, length = self.pool.page_size, sequence.computed
        if self.enabled and length % size:
            self._publish(sequence, length // size, length)

    def _publish(self, sequence: Sequence, number: int, length: int) -> None:
        """Make page `number` of the first `length` tokens findable, unless the same is already."""
        size = self.pool.page_size
        name = sequence.name_of(number, length, size)
        names: list[bytes] = []
        # An answer that others go along with for a while is rare, and naming takes time.
        asked = number * size < sequence.prompt_length
        if self.copies_beginnings and asked and not self.pool.is_whole(name):
            begun = sequence.beginnings(number, size, length - number * size)
            names = [name for _, name in begun]
        self.pool.publish(sequence.pages[number], name, number, names)

    def _begin_alike(self, sequence: Sequence) -> None:
        """Copy a page that goes as the sequence's next one for a while, if there is one."""
        size, start = self.pool.page_size, sequence.scheduled
        # The last token is always computed.
        most = len(sequence.tokens) - 1 - start
        for count, name in sequence.beginnings(start // size, size, most):
            page = self.pool.acquire_beginning(name)
            if page is None:
                continue
            copy = self._copy(page)
            if copy is not None:
                sequence.pages.append(copy)
                self._skip(sequence, count)
            return

    def _skip(self, sequence: Sequence, count: int) -> None:
        """Tokens of a sequence need not be computed."""
        sequence.scheduled += count
        if not sequence.preemptions:
            sequence.cached += count

    def _is_known(self, name: bytes) -> bool:
        """Whether nobody has to compute the content of this name."""
        return self.pool.holds(name)

    def _copy(self, page: int) -> int | None:
        """A page of one's own with the same content; None if there is none free."""
        fresh = self.pool.allocate(1)
        if fresh is None:
            self.pool.release([page])
            return None
        self.moves.append((Move.COPY, page, fresh[0]))
        self.sources.append([page])
        return fresh[0]

    def _restore(self, name: bytes) -> int | None:
        """A page that is filled from the cold tier, if it lies there and that is worth it."""
        if not self.cold.worth_restoring(name):
            return None
        fresh = self.pool.allocate(1, windowed=False)
        # Making room may have pushed it out.
        slot = self.cold.take(name)
        if fresh is None or slot is None:
            self.pool.release(fresh or [])
            return None
        self.moves.append((Move.RESTORE, slot, fresh[0]))
        return fresh[0]

    def _evicted(self, page: int, names: tuple[bytes, ...], depth: int) -> int | None:
        """The slot of the cold tier that a page goes to, if it gets one."""
        slot = self.cold.put(names, depth)
        if slot is not None:
            self.moves.append((Move.DEMOTE, page, slot))
        return slot
