"""Runs steps away from the event loop, in the order in which they were submitted.

A `Stepper` is the seam between the loop and whatever executes: a thread in this process, ranks in
others, a simulator. It never blocks the loop: `fileno()` becomes readable when a result is there.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from typing import Generic, Protocol, TypeVar

from engine.errors import EngineFailed
from engine.scheduling.plan import Plan, StepResult

# How long closing waits for the step under way.
CLOSE_SECONDS = 10.0

F = TypeVar("F")


class Stepper(Protocol):
    """One step runs at a time; others may wait behind it."""

    def submit(self, plan: Plan) -> None:
        """Take what the plan needs, start the step when those before it have ended, return at
        once."""
        ...

    def ready(self) -> bool:
        """Whether a step has finished whose result was not taken yet."""
        ...

    def result(self) -> StepResult:
        """The oldest finished step's result, or the exception that it raised."""
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
    """Steps an executor on a dedicated thread; a pipe wakes the loop."""

    def __init__(self, executor: Executor[F]) -> None:
        self._executor = executor
        self._work: queue.SimpleQueue[tuple[F, float] | None] = queue.SimpleQueue()
        self._outcomes: deque[StepResult | BaseException] = deque()
        self._read, self._write = os.pipe()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="ryzanstein-step", daemon=True)
        self._thread.start()

    def submit(self, plan: Plan) -> None:
        start = time.perf_counter()
        filled = self._executor.fill(plan)
        self._work.put((filled, time.perf_counter() - start))

    def ready(self) -> bool:
        return bool(self._outcomes)

    def result(self) -> StepResult:
        os.read(self._read, 1)
        outcome = self._outcomes.popleft()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._work.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise EngineFailed("the step under way hangs; it was left behind")
        os.close(self._read)
        os.close(self._write)
        self._executor.close()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            filled, fill_seconds = work
            outcome: StepResult | BaseException
            try:
                outcome = self._executor.run(filled)
                outcome.seconds["fill"] = fill_seconds
            except BaseException as error:  # noqa: BLE001  (handed to the loop, which raises it)
                outcome = error
            # In this order, so that whoever sees the outcome finds the byte, which may not block.
            os.write(self._write, b"\0")
            self._outcomes.append(outcome)
