"""The time between an answer's tokens, as listeners and metrics are told."""

from __future__ import annotations

import time

import anyio

from engine import AsyncEngine, SamplingParams
from engine.scheduling.policy import ENOUGH_LENGTHS
from engine.types import RequestStats, StepStats
from server.telemetry import Metrics
from server.traffic import Traffic
from tests.mock import mock_engine

TOKENS = 20


class Gaps:
    """Keeps every gap, once for each token."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def on_step(self, stats: StepStats) -> None:
        for seconds, times in stats.gaps.items():
            self.all += [seconds] * times

    def on_request(self, stats: RequestStats) -> None:
        pass


def watched(delay: float = 0.01, **options: int) -> tuple[AsyncEngine, Gaps, Metrics]:
    engine, executor = mock_engine(**options)
    executor.delay = delay
    gaps, metrics = Gaps(), Metrics(engine, Traffic())
    engine.add_listener(gaps)
    engine.add_listener(metrics)
    return engine, gaps, metrics


def slower_than(metrics: Metrics, bound: str) -> float:
    """Tokens that came later, of all."""
    counts = [
        metrics.registry.get_sample_value("ryzanstein_inter_token_seconds_bucket", {"le": le})
        for le in (bound, "+Inf")
    ]
    assert counts[0] is not None
    assert counts[1] is not None
    return counts[1] - counts[0]


async def run(engine: AsyncEngine, prompt: str = "abcd", **params: int) -> None:
    async for _ in engine.generate(prompt, SamplingParams(max_tokens=TOKENS, **params)):
        pass


async def test_every_token_but_a_choices_first_has_a_gap() -> None:
    engine, gaps, metrics = watched()
    async with engine:
        await run(engine, n=2)
        await anyio.sleep(1.2)  # idle time lies between no two tokens of an answer
        await run(engine)
        assert len(gaps.all) == 3 * (TOKENS - 1)
        # On a busy machine two results may be taken at once; their sum stays.
        assert sum(gaps.all) > len(gaps.all) * 0.008
        assert slower_than(metrics, "1.0") == 0


async def test_a_stall_is_as_long_as_it_was() -> None:
    """Of the whole event loop, so that neither tokens nor steps get on."""
    engine, gaps, metrics = watched()
    async with engine:
        async for delta in engine.generate("abcd", SamplingParams(max_tokens=TOKENS)):
            if delta.usage is None and not any(gap > 1 for gap in gaps.all):
                await anyio.sleep(0.05)
                time.sleep(2.7)  # noqa: ASYNC251
                await anyio.sleep(0.05)
        assert 2.6 < max(gaps.all) < 4
        assert slower_than(metrics, "2.5") == 1


async def test_what_was_preempted_has_waited_as_long_as_it_did() -> None:
    """Two that grow beyond the pool: one makes way until the other has ended."""
    engine, gaps, metrics = watched(delay=0.06, pages=8, context=32)
    async with engine:
        for _ in range(ENOUGH_LENGTHS):  # outputs are short, as far as anybody knows
            engine.parts.scheduler.lengths.record(1)
        async with anyio.create_task_group() as group:
            group.start_soon(run, engine, "abcd")
            group.start_soon(run, engine, "efgh")
        assert engine.parts.scheduler.preemptions == 1
        assert len(gaps.all) == 2 * (TOKENS - 1)
        assert slower_than(metrics, "0.5") == 1
        assert max(gaps.all) > 0.5


async def test_while_a_reader_wants_nothing_it_waits_for_nothing() -> None:
    engine, gaps, metrics = watched()
    async with engine:
        stream = await engine.submit("abcd", SamplingParams(max_tokens=TOKENS))
        await anyio.sleep(0.05)
        engine.pause(*stream.request_ids)
        await anyio.sleep(1.2)
        engine.unpause(*stream.request_ids)
        async for _ in stream:
            pass
        assert len(gaps.all) == TOKENS - 1
        assert max(gaps.all) < 1
        assert slower_than(metrics, "1.0") == 0
