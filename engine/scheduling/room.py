"""Whether a waiting sequence can run: pages that everybody is going to need, and fair shares."""

from __future__ import annotations

from collections.abc import Sequence as List

from engine.scheduling.policy import OutputLengths, peak_pages, victim_key
from engine.scheduling.prefixes import Prefixes
from engine.scheduling.sequence import Sequence
from engine.scheduling.tenants import OUTPUT_WEIGHT, Account, FairQueue, service_left

NO_PAGES = "no free pages"
# Prompts of tenants below their share that may be under way beside the usual number.
BESIDE = 4
# Why a tenant is passed over; after the first two it keeps its turn.
BUSY, FULL, OUT_OF_TURN = "prompts under way", "batch full", "others are due first"
# One slot in so many stays free for tenants that are below their share.
RESERVED = 8


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
        base = max(0, self._pool.used - sum(map(self._own, running)))
        if base + peak_pages([*everyone, mine]) > self._pool.available:
            return NO_PAGES
        if self._lacks_windows([*running, sequence]):
            return NO_PAGES
        share = sequence.account.tenant.page_share
        if share < 1:
            own = [self.need(s) for s in running if s.account is sequence.account]
            if own and peak_pages([*own, mine]) > share * self._pool.total:
                return "its tenant's share of the pages is in use"
        return None

    def need(self, sequence: Sequence) -> tuple[int, int]:
        """Pages that are its own, those of its prompt included, and those that are to come."""
        # What is only cached is free now, and will not be any more.
        found = (
            sequence.shared if sequence.pages else self._prefixes.known_pages(sequence, held=True)
        )
        held = self._pages(len(sequence.tokens))
        return held - found, max(0, self._last_pages(sequence) - held)

    def _own(self, sequence: Sequence) -> int:
        """Those of `need` that it has already."""
        return min(self._pages(len(sequence.tokens)), len(sequence.pages)) - sequence.shared

    def _pages(self, length: int) -> int:
        """Pages of so many tokens."""
        return -(-length // self._pool.page_size)

    def _last_pages(self, sequence: Sequence) -> int:
        """Pages of its whole text, as long as it is expected to become."""
        length = sequence.prompt_length + self._lengths.expected(
            sequence.generated, sequence.request.max_tokens
        )
        return self._pages(length)

    def _lacks_windows(self, sequences: List[Sequence]) -> bool:
        """Whether there are fewer window pages than sequences are going to hold together: a window
        each, and what the steps of long prompts take beyond that."""
        windows = self._pool.windows
        if windows is None:
            return False
        held = beyond = 0
        for sequence in sequences:
            held += min(self._last_pages(sequence), windows.most)
            beyond += max(0, self._pages(sequence.prompt_length) - windows.most)
        return held + min(beyond, windows.in_steps) > windows.total

    def exceeds_share(self, account: Account) -> bool:
        """Whether a tenant has its share of the slots, if all who ever asked would ask now; one
        slot at least."""
        if len(self._queue.accounts) < 2:
            return False
        return account.running + 1 > max(1, self._queue.share(account, self._max_running))

    def reserved(self, account: Account) -> int:
        """Slots that a tenant above its share leaves to others, who then need not wait for one."""
        return self._max_running // RESERVED if self.exceeds_share(account) else 0

    def outruns(self, sequence: Sequence, due: List[Account], running: List[Sequence]) -> bool:
        """Whether a tenant whose turn it is not could be served so much, by all that it has running
        and this sequence, that those who are `due` fall behind by more than the bound of VTC."""
        account = sequence.account
        coming = sum(service_left(s) for s in running if s.account is account)
        ahead = account.counter + (coming + service_left(sequence)) / account.tenant.weight
        weight = min(a.tenant.weight for a in (account, *due))
        bound = OUTPUT_WEIGHT * self._pool.total * self._pool.page_size / weight
        return ahead - min(a.counter for a in due) > bound

    def who_makes_way(
        self, account: Account, free_slots: int, short_of_pages: bool, running: List[Sequence]
    ) -> Sequence | None:
        """Who goes so that the tenant of the queue's head gets its share of slots or pages, or so
        that the reserve is there for the next one; None if nobody has to."""
        if short_of_pages or not free_slots:
            return self._above_share(account, running)
        if free_slots < self.reserved(account):
            return self._above_share(None, running)
        return None

    def _above_share(self, account: Account | None, running: List[Sequence]) -> Sequence | None:
        """The one that loses least of the tenant furthest above its share of the slots; None if
        there is none, or `account` has its own share already or would not come before it."""
        busy = [a for a in self._queue.accounts.values() if a.busy]
        slot = self._max_running / sum(a.tenant.weight for a in busy)
        if account is not None and account.running + 1 > slot * account.tenant.weight:
            return None
        richest = max(busy, key=lambda a: a.running / a.tenant.weight)
        if richest is account or richest.running <= max(1, slot * richest.tenant.weight):
            return None
        if account is not None and richest.counter <= account.counter:
            return None  # it would be let in again at once
        candidates = [s for s in running if s.account is richest]
        return min(candidates, key=lambda s: victim_key(s, self._pool.page_size))
