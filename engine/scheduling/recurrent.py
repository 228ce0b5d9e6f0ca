"""Sharing of what recurrent layers have computed: pages up to a snapshot of their state.

Nobody computes what another is about to keep: a prompt waits for a state that somebody on the same
way has promised, and begins from it. Promises are made, all at once, when a prompt begins, and a
prompt that has begun waits for nobody, so no two wait for each other.
"""

from __future__ import annotations

from engine.scheduling.cold import ColdIndex
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Chunk, Move, Plan
from engine.scheduling.prefixes import Prefixes
from engine.scheduling.sequence import Sequence
from engine.scheduling.snapshots import Kept, Snapshots
from engine.scheduling.windowed import WindowedPrefixes

# Tokens that a sequence draws between two states that are kept, at least.
STRIDE = 64


def prefixes_of(
    pool: PagePool, cold: ColdIndex, snapshots: Snapshots | None, enabled: bool
) -> Prefixes:
    """What a model's sequences can share; `snapshots` are None where no layer keeps a state."""
    if snapshots is not None:
        assert pool.windows is None, "a state's pages are kept whole"
        return RecurrentPrefixes(pool, cold, snapshots, enabled=enabled)
    if pool.windows is not None:
        return WindowedPrefixes(pool, cold, pool.windows, enabled=enabled)
    return Prefixes(pool, cold, enabled=enabled)


class RecurrentPrefixes(Prefixes):
    """Prefixes of models whose layers keep states; see `Prefixes`."""

    copies_beginnings = False
    # A state is kept for pages that have a name.
    named_together = 1

    def __init__(
        self, pool: PagePool, cold: ColdIndex, snapshots: Snapshots, *, enabled: bool
    ) -> None:
        super().__init__(pool, cold, enabled=enabled and snapshots.total > 0)
        self.snapshots = snapshots
        cold.on_drop = self._dropped
        # Pages behind which those that have begun are going to keep their states, ascending.
        self._goals: dict[Sequence, list[int]] = {}
        self._promised: dict[bytes, Sequence] = {}
        # What a prompt waits for that has not begun.
        self._awaited: dict[Sequence, bytes] = {}
        # The name of the last state that each has kept.
        self._last: dict[Sequence, bytes] = {}

    @property
    def states(self) -> tuple[int, int]:
        return len(self.snapshots), self.snapshots.total

    def known_pages(self, sequence: Sequence, *, held: bool = False, cold: bool = False) -> int:
        if not self.shares(sequence):
            return 0
        count = self._deepest(sequence, 0)
        return self._held(sequence, count) if held else count

    def catch_up(self, sequence: Sequence) -> bool:
        size = self.pool.page_size
        begun = sequence in self._goals or sequence.scheduled % size
        if begun or not self.shares(sequence):
            return True
        if self._awaited.get(sequence) in self._promised:
            return False
        here, most = sequence.scheduled // size, (len(sequence.tokens) - 1) // size
        best = self._deepest(sequence, here)
        names = (sequence.page_hash(number, size) for number in range(best, most))
        awaited = next((name for name in names if name in self._promised), None)
        if awaited is not None:
            self._awaited[sequence] = awaited
            return False
        self._awaited.pop(sequence, None)
        if best > here:
            self._resume(sequence, here, best)
        return True

    def cut(self, sequence: Sequence, count: int) -> int:
        if count <= 0 or not self.shares(sequence):
            return count
        size, start = self.pool.page_size, sequence.scheduled
        if sequence not in self._goals:
            self._begin(sequence)
        # In its last piece a prompt keeps a state on the way; others end where they do.
        for goal in self._goals[sequence][:-1]:
            if start < goal * size < start + count:
                return goal * size - start
        return count

    def claim(self, chunk: Chunk, plan: Plan) -> None:
        super().claim(chunk, plan)
        sequence, size = chunk.sequence, self.pool.page_size
        if self.shares(sequence):
            pages = min(chunk.start + chunk.count, len(sequence.tokens) - 1) // size
            if pages * size > chunk.start:
                self._keep(sequence, pages, plan)

    def grew(self, sequence: Sequence, plan: Plan) -> None:
        size = self.pool.page_size
        pages = sequence.scheduled // size
        if self.shares(sequence) and pages % max(1, STRIDE // size) == 0:
            self._keep(sequence, pages, plan)

    def retire(self, plan: Plan, *, done: bool) -> None:
        super().retire(plan, done=done)
        for sequence, kept in plan.kept:
            if not done or sequence in plan.dropped:
                self.snapshots.give_back(kept.place)
                continue
            name = sequence.page_hash(kept.pages - 1, self.pool.page_size)
            if self._promised.get(name) is sequence:
                del self._promised[name]
            if self.pool.holds(name):
                self._put(sequence, name, kept)
            else:
                self.snapshots.give_back(kept.place)

    def left(self, sequence: Sequence) -> None:
        self._last.pop(sequence, None)
        self._awaited.pop(sequence, None)
        if self._goals.pop(sequence, None) is not None:
            self._promised = {n: s for n, s in self._promised.items() if s is not sequence}

    def publish_tail(self, sequence: Sequence) -> None:
        """Nothing: no state lies within a page."""

    def moved(self, plan: Plan, seconds: float) -> float:
        if any(kind is Move.RESUME for kind, _, _ in plan.moves):
            return seconds  # a state is large, and says nothing about a page
        return super().moved(plan, seconds)

    def forget(self) -> None:
        super().forget()
        self.snapshots.clear()

    def _deepest(self, sequence: Sequence, here: int) -> int:
        """How many leading pages can be taken over with a state behind them, at least `here`."""
        size, best = self.pool.page_size, here
        if not len(self.snapshots):
            return best
        for number in range(here, (len(sequence.tokens) - 1) // size):
            name = sequence.page_hash(number, size)
            if not self.pool.holds(name) and not self.cold.worth_restoring(name):
                break
            if name in self.snapshots:
                best = number + 1
        return best

    def _resume(self, sequence: Sequence, here: int, count: int) -> None:
        """Go on behind the first `count` pages, of which it has `here`."""
        size, pages = self.pool.page_size, list[int]()
        for number in range(here, count):
            name = sequence.page_hash(number, size)
            page = self.pool.acquire(name)
            if page is None:
                page = self._restore(name)
            if page is None:  # there is no room to restore it to
                self.pool.release(pages)
                return
            pages.append(page)
        place = self.snapshots.use(sequence.page_hash(count - 1, size))
        self.moves.append((Move.RESUME, place, sequence.slot))
        sequence.pages += pages
        sequence.shared = count
        if not sequence.preemptions:
            sequence.cached += count * size - sequence.scheduled
        sequence.scheduled = count * size

    def _begin(self, sequence: Sequence) -> None:
        """Decide where its states are to be kept for others, and let them wait for those."""
        size = self.pool.page_size
        here, most = sequence.scheduled // size, (len(sequence.tokens) - 1) // size
        leaves = here
        while leaves < most:
            name = sequence.page_hash(leaves, size)
            if not self.pool.holds(name) and name not in self._claims:
                break
            leaves += 1
        goals = sorted({pages for pages in (leaves, most) if pages > here})
        self._goals[sequence] = goals
        for pages in goals:
            self._promised.setdefault(sequence.page_hash(pages - 1, size), sequence)

    def _keep(self, sequence: Sequence, pages: int, plan: Plan) -> None:
        """Have the state behind so many pages kept, if there is a place for it."""
        wanted = pages in self._goals.get(sequence, ())
        place = self.snapshots.place()
        if place is not None:
            plan.kept.append((sequence, Kept(pages, place, wanted)))
        elif wanted:
            self._promised.pop(sequence.page_hash(pages - 1, self.pool.page_size), None)

    def _put(self, sequence: Sequence, name: bytes, kept: Kept) -> None:
        """Let a state be found; the one before it goes, if it was only on the way."""
        self.snapshots.put(name, kept.place, wanted=kept.wanted)
        if (before := self._last.pop(sequence, name)) != name:
            self.snapshots.pass_by(before)
        if sequence.pages:
            self._last[sequence] = name

    def _evicted(self, page: int, names: tuple[bytes, ...], depth: int) -> int | None:
        slot = super()._evicted(page, names, depth)
        self.snapshots.drop(n for n in names if not self.cold.worth_restoring(n))
        return slot

    def _dropped(self, names: tuple[bytes, ...]) -> None:
        """The cold tier has forgotten a page."""
        self.snapshots.drop(name for name in names if not self.pool.holds(name))
