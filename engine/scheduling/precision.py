"""When steps take the model's narrower weights: while requests wait for each other.

That precision may give way to load is MorphServe's idea (arXiv 2506.02006), which swaps layers of a
model as it runs. Here both sets of weights stay in place, and each step takes one.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.scheduling.budget import OVERDUE_SECONDS, SchedulerLimits
from engine.scheduling.cost import CostModel, Work
from engine.scheduling.room import BUSY, FULL, NO_PAGES
from engine.scheduling.sequence import Sequence, State

# Why a request waits, if it is for others.
FOR_OTHERS = (NO_PAGES, BUSY, FULL)
# A prompt is late after OVERDUE_SECONDS and so many times what it would take alone.
SLACK = 2.0
# Seconds without a sign of load before steps are exact again. They double each time that the load
# comes back within as many, so that a load which only narrow steps can bear does not swing.
CALM_SECONDS, MOST_CALM = 5.0, 80.0


class Precision:
    """Switches the cost model, and by it the steps, between quiet and busy."""

    def __init__(self, cost: CostModel, limits: SchedulerLimits) -> None:
        self._cost = cost
        self._limits = limits
        self._calm = CALM_SECONDS
        self._signed = self._returned = float("-inf")

    def choose(
        self,
        now: float,
        decoding: Iterable[Sequence],
        prefilling: Iterable[Sequence],
        blocked: tuple[Sequence, str, int] | None,
    ) -> bool:
        """Whether the next step is a busy one; `blocked` is who was not let in last, and why. What
        has a negative priority may take its time, and is no sign of load."""
        if not self._cost.has_two:
            return False
        late = any(self._is_late(s, now) for s in prefilling)
        if blocked is not None and blocked[1] in FOR_OTHERS:
            late |= blocked[0].state is State.WAITING and self._is_late(blocked[0], now)
        if late or self._decodes_slowly(decoding):
            self._signed = now
            if not self._cost.busy:
                again = now - self._returned < self._calm
                self._calm = min(2 * self._calm, MOST_CALM) if again else CALM_SECONDS
                self._cost.busy = True
        elif self._cost.busy and now - self._signed > self._calm:
            self._returned = now
            self._cost.busy = False
        return self._cost.busy

    def _decodes_slowly(self, decoding: Iterable[Sequence]) -> bool:
        """Whether exact steps would miss the time that they are to take beside decodes."""
        target = self._limits.pace.target
        if not target:
            return False
        work = Work()
        for sequence in decoding:
            if sequence.request.priority >= 0:
                work.decodes += 1
                work.pages += len(sequence.pages)
        return self._cost.predict_quiet(work) > target

    def _is_late(self, prompt: Sequence, now: float) -> bool:
        """Whether others have kept a prompt from its first token."""
        request, rows = prompt.request, self._limits.max_batch_tokens
        if request.priority < 0 or prompt.preemptions:
            return False
        alone = self._cost.prefill_seconds(prompt.prompt_length, rows)
        return now - request.arrival > OVERDUE_SECONDS + SLACK * alone
