"""Who may enter the queue: lengths, caps, quotas, and deadlines that can be met."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import DeadlineExceeded, InvalidRequest, Overloaded
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence as Waiting
from engine.scheduling.tenants import BURST_SECONDS, Account, Tenant
from engine.types import Allowance, QueueProgress, Request

# Tokens of an output of which nothing is known yet.
USUAL_OUTPUT = 128


@dataclass(frozen=True)
class Limits:
    """What one engine holds. `context` bounds prompt plus output, and always fits the pool."""

    context: int
    max_waiting: int
    max_waiting_tokens: int


def check_length(
    prompt_tokens: int, max_tokens: int | None, limits: Limits, room_for: int | None = None
) -> int:
    """The request's output budget. Raises InvalidRequest if it can never fit: into the context, or
    into the `room_for` tokens that its tenant's share of the cache has."""
    holds, what = limits.context, "the context"
    if room_for is not None and room_for < holds:
        holds, what = room_for, "this tenant's share of the KV cache"
    if prompt_tokens >= holds:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens, but {what} holds {holds} "
            "including at least one token of output; shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )
    room = holds - prompt_tokens
    if max_tokens is not None and max_tokens > room:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but "
            f"{what} holds {holds}; ask for at most {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest unless `ids` are tokens below `vocab_size`, and at least one."""
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InvalidRequest(
            f"the prompt holds a token id outside 0..{vocab_size - 1}", param="prompt"
        )


def share_tokens(tenant: Tenant, pages: int, page_size: int) -> int | None:
    """Tokens that a tenant's share of the pool holds; None if it may have all of it."""
    if tenant.page_share >= 1:
        return None
    return max(1, int(tenant.page_share * pages)) * page_size


class Admission:
    """Decides at the door, by the queue and by what the cost model says of it. Pages are named
    with the `fingerprint` of what computes them."""

    def __init__(self, scheduler: Scheduler, limits: Limits, fingerprint: bytes = b"") -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._fingerprint = fingerprint
        self.refusals: Counter[tuple[str, str]] = Counter()
        """How often whom has been refused, by tenant and reason."""

    def admit(self, request: Request, now: float) -> None:
        """Raises Overloaded if the queue is full, the tenant's quota is used up, or the deadline
        cannot be met for those who wait; DeadlineExceeded if it could not be met even alone."""
        try:
            self._check(request, now)
        except (Overloaded, DeadlineExceeded) as error:
            self.refusals[request.tenant, getattr(error, "reason", "too_late")] += 1
            raise

    def _check(self, request: Request, now: float) -> None:
        n = request.sampling.n
        tokens = n * len(request.prompt_ids)
        account = self.check_room(request.tenant, n, tokens, now, patient=request.is_patient)
        self._check_deadline(request, account.waiting, now)

    def charging(self, tenant: str, now: float, *, patient: bool = False) -> Callable[[int], None]:
        """What counts tokens that are computed for a tenant beside the scheduler. Raises Overloaded
        if its rate is used up."""
        if not self._scheduler.queue.tenant(tenant).tokens_per_second:
            return lambda tokens: None
        try:
            return self._account(tenant, now, patient=patient).take_elsewhere
        except Overloaded as error:
            self.refusals[tenant, error.reason] += 1
            raise

    def check_room(
        self, tenant: str, n: int, prompt_tokens: int, now: float, *, patient: bool = False
    ) -> Account:
        """The account of a tenant that may queue `n` sequences with so many tokens of prompts.
        Raises Overloaded if it may not now."""
        queue, limits = self._scheduler.queue, self._limits
        account = self._account(tenant, now, patient=patient)
        queued = len(queue)
        tokens = queue.tokens + prompt_tokens
        if queued + n > limits.max_waiting:
            self._refuse(f"{queued} sequences are waiting, the limit is {limits.max_waiting}")
        if queued and tokens > limits.max_waiting_tokens:
            self._refuse(
                f"{tokens} tokens would be waiting, the limit is {limits.max_waiting_tokens}"
            )
        crowded = 2 * (queued + n) > limits.max_waiting and len(queue.accounts) > 1
        if crowded and len(account.waiting) + n > queue.share(account, limits.max_waiting):
            self._refuse(f"{len(account.waiting)} sequences of this tenant are waiting", "share")
        return account

    def _account(self, tenant: str, now: float, *, patient: bool) -> Account:
        """A tenant's, if its rate allows another request."""
        account = self._scheduler.queue.account(tenant, now)
        wait = account.wait_for_quota(now, patient=patient)
        if wait > 0:
            rate = account.tenant.tokens_per_second
            raise Overloaded(
                f"the tenant's rate of {rate:g} tokens/s is used up; retry later",
                retry_after=wait,
                reason="rate",
            )
        return account

    @property
    def is_full(self) -> bool:
        """Whether whoever comes now is refused."""
        return len(self._scheduler.queue) >= self._limits.max_waiting

    def queue_seconds(self) -> float:
        """How long the queued work takes: prompts of the mean length in full steps, outputs of the
        usual length in full batches."""
        scheduler = self._scheduler
        queued = len(scheduler.queue)
        if not queued:
            return 0.0
        rows = min(queued, scheduler.limits.max_running)
        steps = queued * scheduler.lengths.expected(0, USUAL_OUTPUT) / rows
        # Each by itself: one prompt of all their tokens would read far more of what is before it.
        prefill = queued * self._prefill_seconds(scheduler.queue.tokens // queued)
        return prefill + steps * scheduler.cost.decode_seconds(rows, 0)

    def allowance(self, tenant: str, now: float) -> Allowance:
        """What a tenant may ask for before it is refused."""
        queue, limits = self._scheduler.queue, self._limits
        seconds = self.queue_seconds()
        rate = queue.tenant(tenant).tokens_per_second
        tokens, reset = limits.max_waiting_tokens, seconds
        left = tokens - queue.tokens
        if rate:
            account = queue.account(tenant, now)
            account.wait_for_quota(now)
            tokens, left = int(BURST_SECONDS * rate), int(account.level)
            reset = max(0.0, BURST_SECONDS - account.level / rate)
        return Allowance(
            requests=limits.max_waiting,
            requests_left=self._requests_left(tenant),
            requests_reset=seconds,
            tokens=tokens,
            tokens_left=max(0, left),
            tokens_reset=reset,
        )

    def _requests_left(self, tenant: str) -> int:
        """How many the queue still takes of a tenant: see `check_room`."""
        queue, most = self._scheduler.queue, self._limits.max_waiting
        left, account = most - len(queue), queue.accounts.get(tenant)
        if account is not None and len(queue.accounts) > 1:
            own = int(queue.share(account, most)) - len(account.waiting)
            left = min(left, max(own, most // 2 - len(queue)))
        return max(0, left)

    def progress(self, sequence: Waiting) -> QueueProgress:
        """Where a waiting sequence stands."""
        queue = self._scheduler.queue
        position = queue.position(sequence)
        seconds = self.queue_seconds() * (position + 1) / len(queue)
        reason = self._scheduler.waits_for(sequence.account)
        return QueueProgress(position=position, seconds=seconds, reason=reason)

    def _refuse(self, why: str, reason: str = "queue") -> None:
        # When half of the queue has gone there is room for those who were told to come back.
        wait = self.queue_seconds() / 2
        raise Overloaded(f"{why}; retry later", retry_after=wait, reason=reason)

    def _check_deadline(self, request: Request, waiting: list[Waiting], now: float) -> None:
        """Refuse at once what cannot be in time."""
        due = request.due
        if math.isinf(due):
            return
        alone = self._prefill_seconds(len(request.prompt_ids))
        if now + alone > due:
            alone = self._left_seconds(Waiting(request, 0, fingerprint=self._fingerprint))
        if now + alone > due:
            raise DeadlineExceeded(
                f"the prompt alone takes about {alone * 1e3:.0f} ms, longer than the deadline "
                "allows; shorten the prompt or give it more time"
            )
        # Its tenant's more urgent requests come first; others share the time with it.
        ahead = [
            s for s in waiting if s.request.priority >= request.priority and s.request.due <= due
        ]
        wait = sum(self._prefill_seconds(len(s.tokens)) for s in ahead)
        if ahead and now + wait + alone > due:
            wait = sum(map(self._left_seconds, ahead))
            alone = self._left_seconds(Waiting(request, 0, fingerprint=self._fingerprint))
        if ahead and now + wait + alone > due:
            raise Overloaded(
                f"the deadline cannot be met: prompts that take {wait * 1e3:.0f} ms come first; "
                "retry later or give it more time",
                retry_after=wait,
                reason="deadline",
            )

    def _left_seconds(self, sequence: Waiting) -> float:
        """How long a prompt takes behind what has been computed of it before."""
        prefixes = self._scheduler.prefixes
        known = prefixes.known_pages(sequence, cold=True) * prefixes.pool.page_size
        return self._prefill_seconds(len(sequence.tokens)) - self._prefill_seconds(known)

    def _prefill_seconds(self, tokens: int) -> float:
        scheduler = self._scheduler
        rows, size = scheduler.limits.max_batch_tokens, scheduler.pool.page_size
        return scheduler.cost.prefill_seconds(tokens, rows, size)
