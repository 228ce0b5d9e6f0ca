"""Answers under grammars: what a step costs more by it, on a real model.

python -m perf.structured
"""

from __future__ import annotations

import asyncio
import statistics
from typing import Annotated

from cyclopts import App, Parameter

from engine import AsyncEngine, Grammar, SamplingParams, StepStats
from engine.types import RequestStats

app = App(help=__doc__)
PERSON = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 50,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 4},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "email": {"type": "string"},
                    "role": {"enum": ["admin", "user", "guest"]},
                },
                "required": ["name", "age", "email", "role"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}


class Steps:
    """Collects the times of steps that only decode."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self.seconds: list[dict[str, float]] = []

    def on_step(self, stats: StepStats) -> None:
        if stats.decode_rows == self._streams and not stats.prefill_tokens:
            self.seconds.append(stats.seconds)

    def on_request(self, stats: RequestStats) -> None:
        pass


async def run(engine: AsyncEngine, steps: Steps, streams: int, tokens: int, form: bool) -> float:
    """Median seconds of a step, forward and sampling together."""
    steps.seconds = []
    grammar = Grammar.json_schema(PERSON) if form else None
    params = [
        SamplingParams(max_tokens=tokens, seed=n, grammar=grammar, ignore_eos=not form)
        for n in range(streams)
    ]

    async def one(number: int) -> None:
        messages = [{"role": "user", "content": f"List people, number {number}, as JSON."}]
        async for _ in engine.chat(messages, params[number]):
            pass

    await asyncio.gather(*map(one, range(streams)))
    return statistics.median(s["forward"] + s["sample"] for s in steps.seconds)


async def measure(model: str, streams: list[int], tokens: int, rounds: int) -> None:
    async with AsyncEngine.from_pretrained(model, scheduler__speculative_tokens=0) as engine:
        for count in streams:
            steps = Steps(count)
            engine.add_listener(steps)
            await run(engine, steps, count, 48, form=True)  # compiles
            ratios, times = [], []
            for _ in range(rounds):
                free = await run(engine, steps, count, tokens, form=False)
                bound = await run(engine, steps, count, tokens, form=True)
                ratios.append(bound / free)
                times.append((free, bound))
            free, bound = (statistics.median(t) * 1e3 for t in zip(*times, strict=True))
            print(
                f"{count:3} streams: {free:.2f} ms free, {bound:.2f} ms under a schema, "
                f"{statistics.median(ratios):.3f} of it"
            )


@app.default
def main(
    *,
    model: str = "smollm2-135m",
    streams: Annotated[list[int], Parameter(consume_multiple=True)] | None = None,
    tokens: int = 200,
    rounds: int = 5,
) -> None:
    """Alternate free and constrained runs, and print medians and their ratio."""
    asyncio.run(measure(model, streams or [1, 16], tokens, rounds))


if __name__ == "__main__":
    app()
