"""Whether a waiting sequence can run: pages that everybody is going to need, and fair shares."""

from __future__ import annotations

from collections.abc import Sequence as List

from engine.scheduling.policy import OutputLengths, peak_pages, victim_key
from engine.scheduling.prefixes import Prefixes
from engine.scheduling.sequence import Sequence
from engine.scheduling.tenants import Account, FairQueue


class Room:
    """Looks at the pool, the queue and what runs; changes nothing."""

    def __init__(
        self, prefixes: Prefixes, queue: FairQueue, lengths: OutputLengths, max_running: int
    ) -> None:
        self._prefixes = prefixes
        self._pool = prefixes.pool
        self._queue = queue
        self._lengths = lengths
        self._max_running = max_running

    def lacking(self, sequence: Sequence, running: List[Sequence]) -> str | None:
        """Why a sequence cannot run beside others; None if it can. Alone it always fits."""
        if not running:
            return None
        everyone = [self.need(s) for s in running]
        mine = self.need(sequence)
        # Pages that several share are held once, whoever ends.
        base = max(0, self._pool.used - sum(held for held, _ in everyone))
        if base + peak_pages([*everyone, mine]) > self._pool.available:
            return "no free pages"
        share = sequence.account.tenant.page_share
        if share < 1:
            own = [self.need(s) for s in running if s.account is sequence.account]
            if own and peak_pages([*own, mine]) > share * self._pool.total:
                return "its tenant's share of the pages is in use"
        return None

    def need(self, sequence: Sequence) -> tuple[int, int]:
        """Pages that are its own, those of its prompt included, and those that are to come."""
        size = self._pool.page_size
        # What is only cached is free now, and will not be any more.
        found = (
            sequence.shared if sequence.pages else self._prefixes.known_pages(sequence, held=True)
        )
        held = -(-len(sequence.tokens) // size)
        length = sequence.prompt_length + self._lengths.expected(
            sequence.generated, sequence.request.max_tokens
        )
        return held - found, max(0, -(-length // size) - held)

    def above_share(self, account: Account, running: List[Sequence]) -> Sequence | None:
        """Who makes way for a tenant that has less than its share of the slots: the one that loses
        least of the tenant that is furthest above its own; None if nobody has to."""
        busy = [a for a in self._queue.accounts.values() if a.busy]
        slot = self._max_running / sum(a.tenant.weight for a in busy)
        if account.running + 1 > slot * account.tenant.weight:
            return None
        richest = max(busy, key=lambda a: a.running / a.tenant.weight)
        if richest is account or richest.running <= slot * richest.tenant.weight:
            return None
        candidates = [s for s in running if s.account is richest]
        return min(candidates, key=lambda s: victim_key(s, self._pool.page_size))
