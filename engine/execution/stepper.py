"""Runs steps away from the event loop, one at a time.

A `Stepper` is the seam between the loop and whatever executes: a thread in this process, ranks in
others, a simulator. It never blocks the loop: `fileno()` becomes readable when a result is there.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import Protocol

from engine.errors import EngineFailed
from engine.scheduling.scheduler import Plan, StepResult

# How long closing waits for the step under way.
CLOSE_SECONDS = 10.0


class Stepper(Protocol):
    """At most one step is under way."""

    def submit(self, plan: Plan) -> None:
        """Take what the plan needs, start the step, return at once."""
        ...

    def result(self) -> StepResult:
        """The finished step's result, or the exception that it raised."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while a result waits."""
        ...

    def close(self) -> None:
        """Wait for the step under way and release everything. EngineFailed if it hangs."""
        ...


class Executor(Protocol):
    """What a `ThreadStepper` drives: `fill` on the caller's thread, `run` on the step thread."""

    def fill(self, plan: Plan) -> None: ...

    def run(self) -> StepResult: ...

    def close(self) -> None: ...


class ThreadStepper:
    """Steps an executor on a dedicated thread; a pipe wakes the loop."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._work: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._outcome: StepResult | BaseException | None = None
        self._fill_seconds = 0.0
        self._read, self._write = os.pipe()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="ryzanstein-step", daemon=True)
        self._thread.start()

    def submit(self, plan: Plan) -> None:
        start = time.perf_counter()
        self._executor.fill(plan)
        self._fill_seconds = time.perf_counter() - start
        self._work.put(True)

    def result(self) -> StepResult:
        os.read(self._read, 1)
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        outcome.seconds["fill"] = self._fill_seconds
        return outcome

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._work.put(False)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise EngineFailed("the step under way hangs; it was left behind")
        os.close(self._read)
        os.close(self._write)
        self._executor.close()

    def _loop(self) -> None:
        while self._work.get():
            try:
                self._outcome = self._executor.run()
            except BaseException as error:  # noqa: BLE001  (handed to the loop, which raises it)
                self._outcome = error
            os.write(self._write, b"\0")
