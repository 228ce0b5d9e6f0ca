"""Tenants, and the queue that is fair between them.

Fairness is by virtual token counters (VTC, Sheng et al., OSDI 2024, arXiv 2401.00588): a tenant's
counter rises with the service it gets, divided by its weight, and the least counter is served next.
Whoever had nothing queued starts at the least counter of those who had, so nobody saves up service.
The service of two backlogged tenants never differs by more than the paper's bound.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Mapping

import msgspec

from engine.scheduling.sequence import Sequence, by_order, take_out

# Service of a token of input and of output, as in the paper.
INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
# Idle tenants that nobody has configured are forgotten beyond so many.
MAX_STRANGERS = 4096
# Seconds of quota that a tenant may use at once.
BURST_SECONDS = 10.0


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may have. 0 means no limit.

    `weight` is its share of the service beside others; `tokens_per_second` of prompt and output
    together, with a burst of ten seconds' worth; `max_running` sequences at once; `page_share` of
    the KV cache; requests ask for at most `max_priority`.
    """

    id: str = ""
    weight: float = 1.0
    tokens_per_second: float = 0.0
    max_running: int = 0
    page_share: float = 1.0
    max_priority: int = 1000


class Account:
    """One tenant's queue and what it has been served."""

    __slots__ = ("charge", "counter", "level", "running", "tenant", "updated", "waiting")

    def __init__(self, tenant: Tenant, now: float) -> None:
        self.counter = 0.0
        self.waiting: list[Sequence] = []
        self.running = 0
        self.tenant = tenant
        self.charge = OUTPUT_WEIGHT / tenant.weight
        self.updated = now
        self.level = BURST_SECONDS * tenant.tokens_per_second

    def configure(self, tenant: Tenant, now: float) -> None:
        """Take over changed limits; what has been served stays, but a new rate begins anew."""
        if tenant.tokens_per_second != self.tenant.tokens_per_second:
            self.level = BURST_SECONDS * tenant.tokens_per_second
            self.updated = now
        self.tenant = tenant
        # What a token of output adds to the counter.
        self.charge = OUTPUT_WEIGHT / tenant.weight

    @property
    def busy(self) -> bool:
        """Whether it has anything queued or running."""
        return bool(self.waiting or self.running)

    @property
    def may_run(self) -> bool:
        """Whether the tenant's cap on running sequences allows another."""
        return not self.tenant.max_running or self.running < self.tenant.max_running

    def take_input(self, tokens: int) -> None:
        """Charge prompt tokens that are computed for it."""
        self.counter += INPUT_WEIGHT * tokens / self.tenant.weight
        self._spend(tokens)

    def take_output(self, tokens: int = 1) -> None:
        """Charge tokens that were drawn for it."""
        self.counter += self.charge * tokens
        self._spend(tokens)

    def give_back_output(self, tokens: int) -> None:
        """Some that were drawn are of no use to it."""
        self.counter -= self.charge * tokens
        self._spend(-tokens)

    def wait_for_quota(self, now: float, *, patient: bool = False) -> float:
        """Seconds until the tenant's rate allows another request; 0 if it does. One that is
        `patient`, for which nobody waits, leaves half of the burst to others."""
        rate = self.tenant.tokens_per_second
        if not rate:
            return 0.0
        self.level = min(self.level + (now - self.updated) * rate, BURST_SECONDS * rate)
        self.updated = now
        # What is queued will be spent, though it has not been yet; what is patient comes later.
        ahead = (s for s in self.waiting if patient or not s.request.is_patient)
        left = self.level - sum(len(s.tokens) for s in ahead)
        if patient:
            left -= BURST_SECONDS * rate / 2
        return 0.0 if left > 0 else (1 - left) / rate

    def take_elsewhere(self, tokens: int) -> None:
        """Charge its rate with what is computed beside the scheduler."""
        self._spend(tokens)

    def _spend(self, tokens: int) -> None:
        """Count tokens against the quota; a request that began may overdraw it."""
        if self.tenant.tokens_per_second:
            self.level -= tokens


def order_key(sequence: Sequence, prefill_seconds: float, patience: float) -> tuple[float, ...]:
    """Order within a tenant: higher priority, then least slack, then first come.

    Slack is the time to the deadline less what the prompt takes. Requests without a deadline are
    taken as due after `patience` seconds, so that those with one cannot hold them back for ever.
    """
    request = sequence.request
    last = request.arrival + patience
    due = last if request.due >= last else request.due - prefill_seconds
    return (-request.priority, due, request.arrival, sequence.index)


def service_left(sequence: Sequence) -> float:
    """The most that a sequence's tenant can still be charged for it, at a weight of 1."""
    read = max(sequence.scheduled, sequence.charged)
    unread = max(0, sequence.prompt_length - read)
    return INPUT_WEIGHT * unread + OUTPUT_WEIGHT * (sequence.final_length - len(sequence.tokens))


class FairQueue:
    """All waiting sequences, by tenant; `head` is the next to be served."""

    def __init__(self) -> None:
        self._tenants: dict[str, Tenant] = {}
        self.accounts: dict[str, Account] = {}
        self.tokens = 0
        self._count = 0
        # The tenant whose queue was emptied last: where whoever comes to an empty house begins.
        self._last: Account | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for account in self.accounts.values():
            yield from account.waiting

    def configure(self, tenants: Mapping[str, Tenant], now: float = 0.0) -> None:
        """Replace the limits of all tenants; nothing that is queued or running is lost."""
        self._tenants = dict(tenants)
        for name, account in self.accounts.items():
            account.configure(self.tenant(name), now)

    def tenant(self, name: str) -> Tenant:
        """The limits of a tenant; an unknown one has the defaults."""
        return self._tenants.get(name) or Tenant(id=name)

    def share(self, account: Account, whole: int) -> float:
        """A tenant's part of `whole` by weight, if all who ever asked would ask now."""
        weights = sum(a.tenant.weight for a in self.accounts.values())
        return whole * account.tenant.weight / weights

    def account(self, name: str, now: float) -> Account:
        """The tenant's account, opened if it is new."""
        account = self.accounts.get(name)
        if account is None:
            if len(self.accounts) > len(self._tenants) + MAX_STRANGERS:
                self._forget_strangers()
            account = self.accounts[name] = Account(self.tenant(name), now)
        return account

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a new sequence that has its `order`."""
        sequence.account = self.account(sequence.request.tenant, now)
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence in its place: a new one, or one that had to make way. Lifts the counter
        of a tenant that had none queued."""
        account = sequence.account
        if not account.waiting:
            queued = [a.counter for a in self.accounts.values() if a.waiting]
            floor = self._last.counter if self._last is not None else 0.0
            account.counter = max(account.counter, min(queued, default=floor))
        bisect.insort(account.waiting, sequence, key=by_order)
        self._count += 1
        self.tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, admitted or ended."""
        waiting = sequence.account.waiting
        take_out(waiting, sequence)
        self._count -= 1
        self.tokens -= len(sequence.tokens)
        if not waiting:
            self._last = sequence.account

    def head(self, passed: Collection[Account] = ()) -> Sequence | None:
        """The first of the tenant that has been served least, among those that may run more and
        have not been `passed` over."""
        able = [a for a in self.accounts.values() if a.waiting and a.may_run and a not in passed]
        if not able:
            return None
        # Of equals, whoever has less running: a newcomer begins at the least counter of all.
        return min(able, key=lambda a: (a.counter, a.running)).waiting[0]

    def position(self, sequence: Sequence) -> int:
        """How many waiting sequences are about to be let in before this one, by weights alone."""
        account = sequence.account
        place = account.waiting.index(sequence)
        served = (place + 1) / account.tenant.weight
        others = (a for a in self.accounts.values() if a is not account)
        return place + sum(min(len(a.waiting), int(served * a.tenant.weight)) for a in others)

    def _forget_strangers(self) -> None:
        for name, account in list(self.accounts.items()):
            if name not in self._tenants and not account.busy:
                del self.accounts[name]
