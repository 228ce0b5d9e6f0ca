"""What tests drive an engine with, and listen to it by."""

from __future__ import annotations

from engine import AsyncEngine, SamplingParams
from engine.types import Delta, RequestStats, StepStats
from tests.mock import continuation


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


async def collect(engine: AsyncEngine, prompt: str, **params: object) -> Delta:
    merged = Delta()
    async for delta in engine.generate(prompt, SamplingParams(**params)):  # type: ignore[arg-type]
        merged.merge(delta)
    return merged


class Recorder:
    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)
