"""Runs steps away from the event loop, in the order in which they were submitted.

A `Stepper` is the seam between the loop and whatever executes: a thread in this process, ranks in
others, a simulator. It never blocks the loop: `fileno()` becomes readable when a result is there.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

from engine.errors import EngineFailed
from engine.execution.bell import Bell
from engine.scheduling.plan import Plan, StepResult

# How long closing waits for the step under way.
CLOSE_SECONDS = 10.0
# Without a step for so long, the next is not expected at once.
IDLE_SECONDS = 0.05

logger = logging.getLogger("ryzanstein.engine")

F = TypeVar("F")


class Stepper(Protocol):
    """One step runs at a time; others may wait behind it."""

    def submit(self, plan: Plan) -> None:
        """Take what the plan needs, start the step when those before it have ended, return at
        once."""
        ...

    @property
    def available(self) -> bool:
        """Whether steps can be submitted now; if not, they can be again later."""
        ...

    @property
    def losses(self) -> int:
        """How often the device has been lost."""
        ...

    @property
    def lead(self) -> float:
        """Seconds before a step's end that the next should be submitted, to run right behind it."""
        ...

    def ready(self) -> bool:
        """Whether a step has finished whose result was not taken yet."""
        ...

    def result(self) -> StepResult:
        """The oldest finished step's result, or the exception that it raised.

        DeviceLost ends every step that has been submitted so far, and may come without any.
        """
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while a result waits."""
        ...

    def close(self) -> None:
        """Wait for the steps under way and release everything. EngineFailed if one hangs."""
        ...


class Executor(Protocol[F]):
    """What a `ThreadStepper` drives: `fill` on the caller's thread, `run` on the step thread."""

    def fill(self, plan: Plan) -> F: ...

    def run(self, filled: F) -> StepResult: ...

    def close(self) -> None: ...


class ThreadStepper(Generic[F]):
    """Steps an executor on a dedicated thread; a pipe wakes the loop. When no step has come for a
    while the thread calls `rest`, which does a little for later ones, until it says False."""

    def __init__(self, executor: Executor[F], rest: Callable[[], bool] | None = None) -> None:
        self._executor = executor
        self._rest = rest
        self._work: queue.SimpleQueue[tuple[F, float] | None] = queue.SimpleQueue()
        self._outcomes: deque[StepResult | BaseException] = deque()
        self._bell = Bell()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="ryzanstein-step", daemon=True)
        self._thread.start()

    def submit(self, plan: Plan) -> None:
        start = time.perf_counter()
        filled = self._executor.fill(plan)
        self._work.put((filled, time.perf_counter() - start))

    @property
    def available(self) -> bool:
        return True

    @property
    def losses(self) -> int:
        return 0

    @property
    def lead(self) -> float:
        return 0.002

    def ready(self) -> bool:
        self._bell.settle()
        return bool(self._outcomes)

    def result(self) -> StepResult:
        outcome = self._outcomes.popleft()
        self._bell.answered()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def fileno(self) -> int:
        return self._bell.reading

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._end():
            raise EngineFailed("the step under way hangs; it was left behind")
        self._bell.close()
        self._executor.close()

    def _end(self) -> bool:
        """Take no more steps; False if those under way take too long."""
        self._work.put(None)
        self._thread.join(CLOSE_SECONDS)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        while (work := self._next()) is not None:
            filled, fill_seconds = work
            self._conclude(partial(self._executor.run, filled), fill_seconds)

    def _may_rest(self) -> bool:
        """Whether no step runs, nor is expected at once, when none has been asked of the thread."""
        return True

    def _next(self) -> tuple[F, float] | None:
        """What is to be done next, or None to end; resting meanwhile."""
        quiet = False
        while self._rest is not None:
            try:
                return self._work.get(timeout=0.0 if quiet else IDLE_SECONDS)
            except queue.Empty:
                quiet = self._may_rest()
            if not quiet:
                continue
            try:
                if not self._rest():
                    break
            except Exception:
                # Steps do not depend on it.
                logger.exception("nothing is done any more while no step runs")
                self._rest = None
        return self._work.get()

    def _conclude(self, result_of: Callable[[], StepResult], fill_seconds: float) -> None:
        outcome: StepResult | BaseException
        try:
            outcome = result_of()
            outcome.seconds["fill"] = fill_seconds
        except BaseException as error:  # noqa: BLE001  (handed to the loop, which raises it)
            outcome = error
        self._outcomes.append(outcome)
        self._bell.ring()


class AheadExecutor(Executor[F], Protocol[F]):
    """What `stepper_for` takes, and an `AheadStepper` drives: its device is given steps while it
    runs others."""

    @property
    def runs_behind(self) -> bool:
        """Whether the device can be."""
        ...

    def rest(self) -> bool:
        """Do a little for later steps while none runs; False if there is nothing to do."""
        ...

    def needs_history(self, filled: F) -> bool:
        """Whether the results of all steps before this one have to be there first."""
        ...

    def launch(self, filled: F) -> Callable[[], StepResult]:
        """Start a step; what is returned waits for its result."""
        ...


class AheadStepper(ThreadStepper[F]):
    """Starts each step as soon as it is there; another thread waits for the results, in order."""

    def __init__(self, executor: AheadExecutor[F]) -> None:
        self._launcher = executor
        self._launched: queue.Queue[tuple[Callable[[], StepResult], float] | None] = queue.Queue()
        super().__init__(executor)

    def _loop(self) -> None:
        collector = threading.Thread(target=self._collect, name="ryzanstein-collect", daemon=True)
        collector.start()
        while (work := self._work.get()) is not None:
            filled, fill_seconds = work
            if self._launcher.needs_history(filled):
                self._launched.join()
            try:
                result_of = self._launcher.launch(filled)
            except BaseException as error:  # noqa: BLE001  (handed to the loop, which raises it)
                result_of = partial(_raise, error)
            self._launched.put((result_of, fill_seconds))
        self._launched.put(None)
        collector.join()

    def _collect(self) -> None:
        while (launched := self._launched.get()) is not None:
            self._conclude(*launched)
            self._launched.task_done()


def stepper_for(executor: AheadExecutor[F]) -> Stepper:
    """What suits an executor's device, if that has no queue of its own."""
    if executor.runs_behind:
        return AheadStepper(executor)
    return ThreadStepper(executor, executor.rest)


def _raise(error: BaseException) -> StepResult:
    raise error
