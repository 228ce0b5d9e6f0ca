"""Steps that a device's queue runs by itself, and beside them those that need Python."""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial
from typing import Protocol

from engine.execution.filled import Filled, Queued
from engine.execution.stepper import CLOSE_SECONDS, IDLE_SECONDS, Executor, ThreadStepper
from engine.scheduling.plan import Plan, StepResult

# Whose step hangs on a thread without Python, which uses their memory.
LEFT_BEHIND: list[QueuedStepper] = []


class QueueExecutor(Executor[Filled | Queued], Protocol):
    """What a `QueuedStepper` drives."""

    def start(self, queued: Queued, told: int) -> None:
        """Have the queue run a step; `told`, a file descriptor, gets a byte when it has ended."""
        ...

    def collect(self, queued: Queued) -> StepResult:
        """What a queued step gave, once it has ended. Raises what it raised."""
        ...

    def drain(self) -> None:
        """Wait until all queued steps have ended."""
        ...

    def rest(self) -> bool:
        """Do a little for later steps while none runs; False if there is nothing to do."""
        ...

    def end(self, seconds: float) -> bool:
        """Queue no more steps; False if those there are take longer."""
        ...


class QueuedStepper(ThreadStepper[Filled | Queued]):
    """Hands steps to the queue from where they are submitted: between two of them there is no
    Python, no lock of an interpreter's, and no other thread's turn. Steps that need Python run on
    the thread, alone; so does what comes behind such a step, or ends a rest."""

    def __init__(self, executor: QueueExecutor) -> None:
        self._queue = executor
        # All steps that have not been taken, in order; None is the thread's.
        self._expected: deque[Queued | None] = deque()
        self._given = self._taken = 0  # steps: to the thread, and by it
        self._order = threading.Lock()
        self._resting = False
        self._ended_at = float("-inf")
        super().__init__(executor, executor.rest)

    def submit(self, plan: Plan) -> None:
        start = time.perf_counter()
        filled = self._executor.fill(plan)
        seconds = time.perf_counter() - start
        with self._order:
            aside = self._resting or self._given != self._taken
            if isinstance(filled, Queued):
                filled.fill_seconds = seconds
                self._expected.append(filled)
                if not aside:
                    self._queue.start(filled, self._bell.writing)
                    return
            else:
                self._expected.append(None)
            self._given += 1
        self._work.put((filled, seconds))

    def ready(self) -> bool:
        self._bell.settle()
        if not self._expected:
            return False
        queued = self._expected[0]
        return bool(self._outcomes) if queued is None else queued.step.done

    def result(self) -> StepResult:
        self._ended_at = time.perf_counter()
        queued = self._expected.popleft()
        if queued is None:
            return super().result()
        self._bell.answered()
        return self._queue.collect(queued)

    def _end(self) -> bool:
        if not super()._end():
            return False
        if not self._queue.end(CLOSE_SECONDS):
            LEFT_BEHIND.append(self)
            return False
        return True

    def _loop(self) -> None:
        while (work := self._next()) is not None:
            self._resting = False
            filled, fill_seconds = work
            if isinstance(filled, Queued):
                self._queue.start(filled, self._bell.writing)
            else:
                self._queue.drain()
                self._conclude(partial(self._executor.run, filled), fill_seconds)
            self._taken += 1

    def _may_rest(self) -> bool:
        # It must not rest beside a step: what is submitted from now on comes here first.
        with self._order:
            recent = time.perf_counter() - self._ended_at < IDLE_SECONDS
            self._resting = not self._expected and not recent
            return self._resting
