"""Steps in a device's queue and those beside it: in order, alone where they need Python."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from engine import AsyncEngine, Delta, EngineFailed, SamplingParams
from engine.execution import queued as module
from engine.execution.filled import Filled, Queued
from engine.execution.queued import QueuedStepper
from engine.execution.stepper import IDLE_SECONDS
from engine.scheduling.plan import StepResult
from kernels.cpu.native_backend import unavailable_reason
from tests.engine.execution.test_stepper import until
from tests.tiny import write_llama


class Line(threading.Thread):
    """A queue of numbers, of which those of three digits fail; runs when its gate is open."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gate = threading.Event()
        self.changed = threading.Condition()
        self.tasks: list[tuple[Any, int]] = []
        self.ended: list[int] = []
        self.running = False
        self.late = 0.0
        self.start()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.tasks)
                step, told = self.tasks.pop(0)
                self.running = True
            assert self.gate.wait(10)
            self.ended.append(step.number)
            step.done = True
            threading.Event().wait(self.late)
            os.write(told, b"\0")
            with self.changed:
                self.running = False
                self.changed.notify_all()


class Number:
    def __init__(self, number: int) -> None:
        self.number = number
        self.done = False


class Device:
    """Positive plans are the queue's, negative ones need Python."""

    def __init__(self) -> None:
        self.line = Line()
        self.aside: list[int] = []
        self.rested = 0
        self.rests = 0
        self.closed = False
        self.resting = False
        self.beside = False

    def fill(self, plan: Any) -> Filled | Queued:
        return Queued(Number(plan), None) if plan > 0 else plan  # type: ignore[arg-type]

    def start(self, queued: Queued, told: int) -> None:
        self.beside |= self.resting
        with self.line.changed:
            self.line.tasks.append((queued.step, told))
            self.line.changed.notify_all()

    def collect(self, queued: Queued) -> StepResult:
        number = queued.step.number  # type: ignore[attr-defined]
        if number >= 100:
            raise ValueError("it failed")
        return StepResult([number], [None], [[]], {"fill": queued.fill_seconds})

    def drain(self) -> None:
        with self.line.changed:
            self.line.changed.wait_for(lambda: not self.line.tasks and not self.line.running)

    def run(self, filled: Any) -> StepResult:
        assert not self.line.running, "it runs alone"
        self.aside.append(filled)
        return StepResult([filled], [], [], {})

    def rest(self) -> bool:
        if not self.rests:
            return False
        self.resting = True
        assert not self.line.tasks
        assert not self.line.running
        self.rests -= 1
        self.rested += 1
        threading.Event().wait(0.002)
        self.resting = False
        return True

    def end(self, seconds: float) -> bool:
        with self.line.changed:
            return self.line.changed.wait_for(
                lambda: not self.line.tasks and not self.line.running, seconds
            )

    def close(self) -> None:
        self.closed = True


def next_of(stepper: QueuedStepper) -> list[int]:
    assert select.select([stepper.fileno()], [], [], 10)[0]
    assert stepper.ready(), "who is told finds it"
    return stepper.result().ids


def submit(stepper: QueuedStepper, *plans: int) -> None:
    for plan in plans:
        stepper.submit(plan)  # type: ignore[arg-type]


def test_results_come_in_the_order_of_their_steps() -> None:
    device = Device()
    device.line.gate.set()
    stepper = QueuedStepper(device)
    plans = [1, 2, -3, 4, -5, -6, 7, 8, 9]
    submit(stepper, *plans)
    assert [next_of(stepper) for _ in plans] == [[plan] for plan in plans]
    assert device.line.ended == [1, 2, 4, 7, 8, 9]
    assert not stepper.ready()
    stepper.close()
    assert device.closed


def test_what_needs_python_waits_for_the_queue_and_the_queue_for_it() -> None:
    device = Device()
    stepper = QueuedStepper(device)
    submit(stepper, 1, -2, 3)
    threading.Event().wait(0.05)
    assert device.aside == []
    assert device.line.ended == []
    device.line.gate.set()
    assert [next_of(stepper) for _ in range(3)] == [[1], [-2], [3]]
    stepper.close()


def test_a_result_may_be_taken_before_its_byte_has_come() -> None:
    device = Device()
    device.line.gate.set()
    device.line.late = 0.05
    stepper = QueuedStepper(device)
    submit(stepper, 1)
    until(stepper.ready)
    assert stepper.result().ids == [1]
    assert not stepper.ready()
    assert select.select([stepper.fileno()], [], [], 10)[0]
    assert not stepper.ready(), "it was told of before"
    assert not select.select([stepper.fileno()], [], [], 0)[0], "and does not wake again"
    submit(stepper, 2)
    assert next_of(stepper) == [2]
    stepper.close()


def test_an_error_comes_in_its_place() -> None:
    device = Device()
    device.line.gate.set()
    stepper = QueuedStepper(device)
    submit(stepper, 1, 100, 2)
    assert next_of(stepper) == [1]
    with pytest.raises(ValueError, match="it failed"):
        next_of(stepper)
    assert next_of(stepper) == [2]
    stepper.close()


def test_it_rests_between_steps_and_never_beside_one() -> None:
    device = Device()
    device.line.gate.set()
    device.rests = 3
    stepper = QueuedStepper(device)
    until(lambda: device.rested == 3)
    submit(stepper, 1)
    assert next_of(stepper) == [1]
    device.rests = 1_000_000
    until(lambda: device.rested > 3)
    for number in range(2, 40):
        submit(stepper, number)
        threading.Event().wait(0.003 if number % 9 else 1.2 * IDLE_SECONDS)
        assert next_of(stepper) == [number]
    assert not device.beside
    device.rests = 0
    stepper.close()


def test_a_step_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    device = Device()
    stepper = QueuedStepper(device)
    submit(stepper, 1)
    with pytest.raises(EngineFailed, match="hangs"):
        stepper.close()
    assert not device.closed
    assert stepper in module.LEFT_BEHIND, "its memory is still used"
    module.LEFT_BEHIND.remove(stepper)
    device.line.gate.set()


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
async def test_company_that_needs_python_changes_no_answer(tmp_path: Any) -> None:
    folder = str(write_llama(tmp_path / "tiny"))
    settings: dict[str, Any] = {"execution__backend": "native", "cache__tokens": 2048}
    plain = {"temperature": 0, "ignore_eos": True, "max_tokens": 60}

    async with AsyncEngine.from_pretrained(folder, **settings) as engine:
        stepper: Any = engine.parts.stepper
        taken: list[Queued | None] = []
        start: Callable[..., None] = stepper._queue.start
        stepper._queue.start = lambda queued, told: (taken.append(queued), start(queued, told))

        async def run(prompt: str, **params: Any) -> Delta:
            merged = Delta()
            async for delta in engine.generate(prompt, SamplingParams(**(plain | params))):
                merged.merge(delta)
            return merged

        alone = await run("Hello")
        assert len(taken) >= 55, "the queue runs what is plain"
        drawn = await run("Hi", temperature=1.0, seed=5)
        answers: list[Delta] = []

        async def keep(prompt: str, **params: Any) -> None:
            answers.append(await run(prompt, **params))

        async with anyio.create_task_group() as group:
            for prompt, params in (
                ("Hello", {}),
                ("Hi", {"temperature": 1.0, "seed": 5}),
                ("Who", {"logprobs": 2, "max_tokens": 10}),
                ("What", {"frequency_penalty": 1.0, "max_tokens": 20}),
            ):
                group.start_soon(lambda p=prompt, q=params: keep(p, **q))
        texts = [answer.text for answer in answers]
        assert alone.text in texts
        assert drawn.text in texts
