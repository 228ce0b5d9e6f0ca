"""A process that may not have the memory its cache would take; run by `test_squeeze`.

It is killed, as the system would, once it holds more than its limit.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import anyio

from engine import AsyncEngine, SamplingParams, engine, load_config
from engine.execution.memory import private_memory
from engine.loading import load
from engine.parts import Parts
from engine.scheduling.controller import CacheController, Readings
from engine.upkeep import Upkeep

MB = 2**20
PROMPTS, LENGTH = 60, 500


def main(model: str, allowed: int) -> None:
    # No system tells of this limit, so nothing may be taken ahead.
    config = load_config(values={"model.name": model, "cache.tokens": 32_768, "cache.ahead_mb": 0})
    limit = 0
    peak = 0

    def parts() -> Parts:
        nonlocal limit
        made = load(config)
        limit = private_memory() + allowed
        pool = made.scheduler.pool
        assert made.budget is not None
        controller = CacheController(pool, made.budget.cache // pool.total, allowed // 3, 64)
        made.upkeep = Upkeep(made.scheduler, controller, lambda: Readings(limit - private_memory()))
        return made

    def kill() -> None:
        nonlocal peak
        while True:
            if limit:
                peak = max(peak, private_memory())
                if peak > limit:
                    os._exit(137)
            time.sleep(0.005)

    engine.UPKEEP_SECONDS = 0.02
    texts: dict[int, list[int]] = {}

    async def one(served: AsyncEngine, number: int) -> None:
        prompt = [(number * 7 + i * i) % 250 for i in range(LENGTH)]
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        texts[number] = []
        async for delta in served.generate(prompt, params):
            texts[number] += delta.token_ids

    async def run() -> None:
        async with AsyncEngine(parts) as served:
            threading.Thread(target=kill, daemon=True).start()
            async with anyio.create_task_group() as group:
                for number in range(PROMPTS):
                    group.start_soon(one, served, number)
            pool = served.parts.scheduler.pool
            report = {
                "texts": [texts[n] for n in range(PROMPTS)],
                "pages": pool.total,
                "in_use": pool.available,
                "peak": (peak - limit + allowed) // MB,
                "cache": served.parts.budget.cache // MB if served.parts.budget else 0,
            }
            print(json.dumps(report))

    anyio.run(run)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
