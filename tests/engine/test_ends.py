"""How an engine ends: broken, hanging, drained, closed."""

from __future__ import annotations

import logging

import anyio
import pytest

from engine import (
    AsyncEngine,
    EngineFailed,
    SamplingParams,
    Terms,
)
from engine.execution import stepper
from engine.types import StepStats
from tests.engine.driving import Recorder, collect, text_of
from tests.mock import mock_engine


async def retired(engine: AsyncEngine) -> None:
    """Until no step is in flight: one behind a failed step still names its pages."""
    while engine.parts.scheduler.in_flight:
        await anyio.sleep(0.001)


async def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, executor = mock_engine()
    async with engine:
        executor.error = RuntimeError("device lost")
        with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed, match="RuntimeError"):
            await collect(engine, "hello", max_tokens=3)
        assert "device lost" in caplog.text
        await retired(engine)
        assert engine.parts.scheduler.pool.used == 0
        assert (await collect(engine, "hello", max_tokens=3)).text == text_of("hello", 3)
        assert engine.health() == "ok"


async def test_three_failed_steps_in_a_row_stop_the_engine() -> None:
    engine, executor = mock_engine()
    async with engine:
        for _ in range(3):
            await retired(engine)  # or a step behind the last one would take it
            executor.error = RuntimeError("device lost")
            with pytest.raises(EngineFailed):
                await collect(engine, "hello", max_tokens=3)
        assert engine.health() == "failed"
        with pytest.raises(EngineFailed, match="restart"):
            await engine.submit("hello")


async def test_a_mistake_outside_the_step_breaks_the_engine_visibly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No request may hang, and health must not say that all is well."""

    class Broken(Recorder):
        def on_step(self, stats: StepStats) -> None:
            raise ZeroDivisionError("listener")

    # A step in flight behind the one that breaks would keep what it names.
    engine, _ = mock_engine(look_ahead=False)
    engine.add_listener(Broken())
    async with engine:
        with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed, match="engine broke"):
            await collect(engine, "hello", max_tokens=3)
        assert "listener" in caplog.text
        assert engine.health() == "failed"
        assert engine.parts.scheduler.pool.used == 0


async def test_closing_does_not_wait_for_a_hanging_step_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stepper, "CLOSE_SECONDS", 0.05)
    engine, executor = mock_engine()
    executor.delay = 0.6
    await engine.__aenter__()
    await engine.submit("hello", SamplingParams(max_tokens=3))
    await anyio.sleep(0.05)
    with pytest.raises(EngineFailed, match="hangs"):
        await engine.__aexit__(None, None, None)
    await anyio.sleep(0.7)  # the thread ends with its step


async def test_a_hanging_step_is_seen() -> None:
    engine, executor = mock_engine(stall_seconds=0.05)
    executor.delay = 0.3
    async with engine:
        stream = await engine.submit("hello", SamplingParams(max_tokens=1))
        await anyio.sleep(0.15)
        assert engine.health() == "stalled"
        await stream.receive()
        assert engine.health() == "ok"


async def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.005
    async with engine:
        stream = await engine.submit("hello", SamplingParams(max_tokens=10))
        async with anyio.create_task_group() as group:
            group.start_soon(engine.drain, 5)
            await anyio.sleep(0.01)
            assert engine.health() == "draining"
            with pytest.raises(EngineFailed, match="shutting down"):
                await engine.submit("more")
            assert "".join([d.text async for d in stream]) == text_of("hello", 10)


async def test_a_drain_that_takes_too_long_tells_the_readers() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.01
    async with engine:
        stream = await engine.submit("hello", SamplingParams(max_tokens=150))
        await engine.drain(0.03)
        with pytest.raises(EngineFailed, match="before the answer was complete"):
            [d async for d in stream]


async def test_a_drain_waits_for_what_goes_on_in_several_requests() -> None:
    engine, _ = mock_engine()
    async with engine, anyio.create_task_group() as group:
        engine.door.hold("answer", lambda: True)
        group.start_soon(engine.drain, 5)
        await anyio.sleep(0.05)
        stream = await engine.submit(
            "hello", SamplingParams(max_tokens=10), terms=Terms(lease="answer")
        )
        with pytest.raises(EngineFailed, match="shutting down"):
            await engine.submit("more", terms=Terms(lease="other"))
        assert "".join([d.text async for d in stream]) == text_of("hello", 10)
        engine.door.release("answer")
        with pytest.raises(EngineFailed, match="shutting down"):
            await engine.submit("more", terms=Terms(lease="answer"))


async def test_closing_the_engine_ends_open_streams() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.01
    async with engine:
        stream = await engine.submit("hello", SamplingParams(max_tokens=100))
    with pytest.raises(EngineFailed, match="closed"):
        [d async for d in stream]


async def test_an_engine_whose_user_is_cancelled_gives_its_device_back() -> None:
    """As Ctrl-C does it: a process that ends within a kernel ends badly."""
    engine, executor = mock_engine()
    executor.delay = 0.01
    with anyio.move_on_after(0.1):
        async with engine:
            async for _ in engine.generate("a", SamplingParams(max_tokens=190)):
                pass
    assert not engine.parts.stepper._thread.is_alive()  # type: ignore[attr-defined]
