"""A process that fills its cache and says what it holds; run by `test_real_models`."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import anyio

from engine import AsyncEngine, SamplingParams
from engine.execution.memory import private_memory


async def main(model: str) -> None:
    chance = random.Random(0)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    # Whole steps also on a slow machine: what no row has reached yet is not held.
    whole: dict[str, Any] = {"scheduler__max_step_ms": 1e5, "scheduler__target_itl_ms": 1e5}
    async with AsyncEngine.from_pretrained(model, cache__tokens=8192, **whole) as engine:
        budget = engine.parts.budget
        assert budget is not None

        async def one() -> None:
            prompt = [chance.randrange(5, 20_000) for _ in range(120)]
            async for _ in engine.generate(prompt, params):
                pass

        async with anyio.create_task_group() as group:
            for _ in range(64):
                group.start_soon(one)
        print(json.dumps({"budget": budget.total, "held": private_memory()}))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
