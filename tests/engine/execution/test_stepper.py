"""Steps away from the loop: in order, one behind another, and what fails is told in its place."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine.execution.stepper import IDLE_SECONDS, AheadStepper, ThreadStepper
from engine.scheduling.plan import StepResult


class Device:
    """Steps are numbers. Those that wait for the gate end when it opens; odd hundreds fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.launched: list[int] = []
        self.ended: list[int] = []
        self.closed = False

    def fill(self, plan: Any) -> int:
        return int(plan)

    def needs_history(self, filled: int) -> bool:
        return filled >= 1000

    def launch(self, filled: int) -> Callable[[], StepResult]:
        self.launched.append(filled)
        if filled == 100:
            raise ValueError("cannot launch")

        def wait() -> StepResult:
            assert self.gate.wait(10)
            self.ended.append(filled)
            if filled == 300:
                raise ValueError("cannot end")
            return StepResult([filled], [], [], {})

        return wait

    def run(self, filled: int) -> StepResult:
        return self.launch(filled)()

    def close(self) -> None:
        self.closed = True


def next_of(stepper: ThreadStepper[int]) -> StepResult:
    assert select.select([stepper.fileno()], [], [], 10)[0]
    while not stepper.ready():
        os.sched_yield()
    return stepper.result()


def until(condition: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(2000):
        if condition():
            return
        deadline.wait(0.005)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("kind", [ThreadStepper, AheadStepper])
def test_results_come_in_order_and_errors_in_their_place(kind: type[ThreadStepper[int]]) -> None:
    device = Device()
    device.gate.set()
    stepper = kind(device)
    for plan in (1, 100, 2, 300, 3):
        stepper.submit(plan)  # type: ignore[arg-type]
    assert next_of(stepper).ids == [1]
    with pytest.raises(ValueError, match="cannot launch"):
        next_of(stepper)
    result = next_of(stepper)
    assert result.ids == [2]
    assert "fill" in result.seconds
    with pytest.raises(ValueError, match="cannot end"):
        next_of(stepper)
    assert next_of(stepper).ids == [3]
    stepper.close()
    stepper.close()
    assert device.closed


def test_a_step_starts_before_the_one_ahead_has_ended() -> None:
    device = Device()
    stepper = AheadStepper(device)
    stepper.submit(1)  # type: ignore[arg-type]
    stepper.submit(2)  # type: ignore[arg-type]
    until(lambda: device.launched == [1, 2])
    assert not stepper.ready()
    device.gate.set()
    assert [next_of(stepper).ids for _ in range(2)] == [[1], [2]]
    stepper.close()


def test_a_step_that_needs_what_was_drawn_waits_for_all_before_it() -> None:
    device = Device()
    stepper = AheadStepper(device)
    stepper.submit(1)  # type: ignore[arg-type]
    stepper.submit(1000)  # type: ignore[arg-type]
    until(lambda: device.launched == [1])
    threading.Event().wait(0.05)
    assert device.launched == [1]
    device.gate.set()
    assert [next_of(stepper).ids for _ in range(2)] == [[1], [1000]]
    assert device.launched == [1, 1000]
    stepper.close()


def test_without_steps_it_rests_until_nothing_is_left_to_do() -> None:
    device, left = Device(), [True, True, False, True, False]
    rested: list[bool] = []

    def rest() -> bool:
        rested.append(left.pop(0))
        return rested[-1]

    device.gate.set()
    stepper = ThreadStepper(device, rest)
    until(lambda: len(rested) == 3)
    threading.Event().wait(0.1)
    assert len(rested) == 3, "it waits for a step before it rests again"
    stepper.submit(1)  # type: ignore[arg-type]
    assert next_of(stepper).ids == [1]
    until(lambda: len(rested) == 5)
    stepper.close()


def test_a_step_does_not_wait_for_all_that_rest_would_do() -> None:
    device = Device()
    device.gate.set()
    stepper = ThreadStepper(device, lambda: True)
    threading.Event().wait(2 * IDLE_SECONDS)
    stepper.submit(1)  # type: ignore[arg-type]
    assert next_of(stepper).ids == [1]
    stepper.close()
    assert device.closed


def test_steps_go_on_when_rest_fails(caplog: pytest.LogCaptureFixture) -> None:
    def rest() -> bool:
        raise OSError("no memory")

    device = Device()
    device.gate.set()
    stepper = ThreadStepper(device, rest)
    until(lambda: "no memory" in caplog.text)
    for number in (1, 2):
        stepper.submit(number)  # type: ignore[arg-type]
        assert next_of(stepper).ids == [number]
        threading.Event().wait(2 * IDLE_SECONDS)
    assert len(caplog.records) == 1
    stepper.close()
