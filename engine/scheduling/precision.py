"""When steps take the model's narrower weights: while requests wait for each other.

That precision may give way to load is MorphServe's idea (arXiv 2506.02006), which swaps layers of a
model as it runs. Here both sets of weights stay in place, and each step takes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List

from engine.scheduling.budget import OVERDUE_SECONDS, SchedulerLimits
from engine.scheduling.cost import CostModel, Work
from engine.scheduling.room import BUSY, FULL, NO_PAGES
from engine.scheduling.sequence import Sequence
from engine.scheduling.tenants import Account, FairQueue

# Why a request waits, if it is for others.
FOR_OTHERS = (NO_PAGES, BUSY, FULL)
# A prompt is late after OVERDUE_SECONDS and so many times what it would take alone.
SLACK = 2.0
# Seconds without a sign of load before steps are exact again. They double each time that the load
# comes back within as many, so that a load which only narrow steps can bear does not swing.
CALM_SECONDS, MOST_CALM = 5.0, 80.0


class Precision:
    """Switches the cost model, and by it the steps, between quiet and busy."""

    def __init__(self, cost: CostModel, limits: SchedulerLimits, page_size: int) -> None:
        self._cost = cost
        self._limits = limits
        self._page_size = page_size
        self._calm = CALM_SECONDS
        self._signed = self._returned = float("-inf")
        self._kept_since: float | None = None

    def choose(
        self,
        now: float,
        decoding: List[Sequence],
        prefilling: List[Sequence],
        queue: FairQueue,
        told: Mapping[Account, tuple[Sequence, str]],
    ) -> bool:
        """Whether the next step is a busy one; `told` is why each tenant's first was not let in.
        What has a negative priority may take its time, and is no sign of load."""
        if not self._cost.has_two:
            return False
        kept = self._are_kept(now, queue, told)
        if kept or any(self._is_late(s, now) for s in prefilling) or self._are_slow(decoding):
            self._signed = now
            if not self._cost.busy:
                again = now - self._returned < self._calm
                self._calm = min(2 * self._calm, MOST_CALM) if again else CALM_SECONDS
                self._cost.busy = True
        elif self._cost.busy:
            over = self._signed + self._calm
            if now > over or not (decoding or prefilling or len(queue)):
                self._returned = min(now, over)
                self._cost.busy = False
        return self._cost.busy

    def _are_kept(
        self, now: float, queue: FairQueue, told: Mapping[Account, tuple[Sequence, str]]
    ) -> bool:
        """Whether somebody has been waiting for others to make room, without a break."""
        kept = any(a.waiting and reason in FOR_OTHERS for a, (_, reason) in told.items())
        # The first of a tenant's has the highest priority.
        if not kept or all(
            a.waiting[0].request.is_patient for a in queue.accounts.values() if a.waiting
        ):
            self._kept_since = None
            return False
        self._kept_since = now if self._kept_since is None else self._kept_since
        return now - self._kept_since > OVERDUE_SECONDS

    def _is_late(self, prompt: Sequence, now: float) -> bool:
        """Whether others have kept a prompt that was let in from its first token."""
        if prompt.request.is_patient or prompt.generated or prompt.entered_at is None:
            return False
        alone = self._cost.quiet.prefill_seconds(
            prompt.prompt_length, self._limits.max_batch_tokens, self._page_size
        )
        return now - prompt.entered_at > OVERDUE_SECONDS + SLACK * alone

    def _are_slow(self, decoding: List[Sequence]) -> bool:
        """Whether exact steps would miss the time that they are to take beside decodes."""
        target = self._limits.pace.target
        if not target:
            return False
        work = Work()
        for sequence in decoding:
            if not sequence.request.is_patient:
                work.decodes += 1
                work.pages += len(sequence.pages)
        return self._cost.predict_quiet(work) > target
