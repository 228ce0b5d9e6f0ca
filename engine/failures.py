"""What becomes of requests when steps fail: theirs end, and in the end all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from engine.delivery import Delivery
from engine.errors import DeviceLost, EngineFailed, InvalidRequest
from engine.scheduling.plan import Plan
from engine.scheduling.scheduler import Scheduler

logger = logging.getLogger("ryzanstein.engine")

# After so many failed steps in a row the engine stops trying.
MAX_FAILURES = 3


class Failures:
    """Counts failed steps; `final` is why there will be no more steps, once that is so."""

    def __init__(self) -> None:
        self.final: EngineFailed | None = None
        self._in_a_row = 0
        self._tainted = 0  # steps in flight that were submitted before one ahead of them failed

    def step_succeeded(self) -> None:
        """A step has a result."""
        if not self._tainted:
            self._in_a_row = 0
        self._tainted = 0

    def rows_failed(self, delivery: Delivery, plan: Plan, faults: Mapping[int, str]) -> None:
        """End the requests of some of a step's rows, before it is committed."""
        for row, reason in faults.items():
            delivery.fail(plan.sequence_at(row).request.id, InvalidRequest(reason, param="grammar"))

    def step_failed(
        self, scheduler: Scheduler, delivery: Delivery, plan: Plan, error: Exception, behind: int
    ) -> None:
        """End the step's requests with one error; the others go on, unless it keeps happening.
        `behind` steps are in flight that were submitted after it."""
        if self._tainted:
            self._tainted -= 1  # it built on a step that had failed
        else:
            self._in_a_row += 1
            self._tainted = behind
        logger.error("step %d failed: %s", plan.step, error, exc_info=error)
        failure = EngineFailed(f"the model's step failed: {type(error).__name__}")
        for sequence in scheduler.discard(plan):
            delivery.fail(sequence.request.id, failure)
        if self._in_a_row >= MAX_FAILURES:
            self.end(delivery, f"{MAX_FAILURES} steps in a row failed; restart the server")

    def device_lost(
        self, scheduler: Scheduler, delivery: Delivery, plans: Sequence[Plan], error: DeviceLost
    ) -> None:
        """The steps in flight, `plans`, are lost, and all that was computed: end every request that
        has begun. Those that never did wait on, unless there will be no device again."""
        self._tainted = 0
        for plan in plans:
            scheduler.discard(plan)
        delivery.fail_all(EngineFailed(str(error)), begun=not error.final)
        scheduler.leases.clear()
        scheduler.prefixes.forget()
        if error.final:
            self.final = EngineFailed(str(error))

    def end(self, delivery: Delivery, reason: str) -> None:
        """There will be no more steps."""
        self.final = EngineFailed(reason)
        delivery.fail_all(self.final)
