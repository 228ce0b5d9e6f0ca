"""Ranks that die, hang or fail while they serve: `python -m tests.engine.execution.faults`.

Each time streams run on two ranks, one of which is killed, stopped, or made to raise at a random
token. Every stream has to end with one error in time, no process of that crew may be left, and the
next request has to get the very tokens that it got before.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import anyio

from engine import AsyncEngine, EngineFailed, SamplingParams
from engine.execution.messages import Step, encode
from engine.execution.parallel import RankStepper
from tests.tiny import write_llama

STREAMS = 4
KINDS = ("kill", "stop", "raise")
# After a death or an exception everything has to have ended within this; a hang is seen only after
# `LEAST_SECONDS` without a step.
PROMISED = {"kill": 1.0, "raise": 1.0, "stop": 2.0}


def break_rank(stepper: RankStepper, rank: int, kind: str) -> None:
    """Do it to one of the ranks."""
    if kind == "raise":
        assert stepper._crew is not None
        # A slot that nobody has entered.
        step = Step(-1, [], [], [(7, 1)], [], [])
        stepper._crew._channels[rank].send(encode(step))
    else:
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        os.kill(stepper.pids[rank], number)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def one_fault(engine: AsyncEngine, chance: random.Random, kind: str) -> float:
    """Seconds from the fault to the end of the last stream. Raises AssertionError."""
    stepper = engine.parts.stepper
    assert isinstance(stepper, RankStepper)
    pids, errors = stepper.pids, []
    tokens = 0
    enough = anyio.Event()
    after = chance.randint(1, 60)

    async def stream(number: int) -> None:
        nonlocal tokens
        try:
            params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
            async for delta in engine.generate(f"prompt {number}", params):
                tokens += len(delta.token_ids)
                if tokens >= after:
                    enough.set()
        except EngineFailed as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        for number in range(STREAMS):
            group.start_soon(stream, number)
        await enough.wait()
        begun = time.monotonic()
        break_rank(stepper, chance.randrange(2), kind)
    seconds = time.monotonic() - begun
    assert len(errors) == STREAMS, f"{STREAMS - len(errors)} streams ended as if nothing had been"
    assert len({str(error) for error in errors}) == 1
    assert not any(alive(pid) for pid in pids), "a rank of the lost crew is left"
    assert seconds < PROMISED[kind], f"{kind}: it took {seconds:.2f} s"
    return seconds


async def answer(engine: AsyncEngine) -> list[int]:
    """Tokens of a request that is served once the ranks are there (again)."""
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    return [i async for d in engine.generate("what it says", params) for i in d.token_ids]


async def run(times: int, seed: int) -> dict[str, list[float]]:
    """Seconds that streams took to end, by kind of fault. Raises AssertionError."""
    chance = random.Random(seed)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        path = write_llama(Path(folder) / "model")
        before = descriptors()
        async with AsyncEngine.from_pretrained(
            str(path), execution__tensor_parallel=2, model__dtype="float32", cache__tokens=4096
        ) as engine:
            wanted = await answer(engine)
            stepper = engine.parts.stepper
            assert isinstance(stepper, RankStepper)
            open_files = descriptors()
            for number in range(times):
                kind = KINDS[number % len(KINDS)]
                seconds[kind].append(await one_fault(engine, chance, kind))
                assert engine.health() == "restarting"
                assert await answer(engine) == wanted, "other tokens than before"
                assert engine.health() == "ok"
                assert descriptors() == open_files, "a descriptor is left"
            assert stepper.losses == times
            pids = stepper.pids
        assert not any(alive(pid) for pid in pids), "a rank outlived its engine"
        # Of the event loop's own one or two stay.
        assert descriptors() <= before + 4, "a descriptor is left"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    found = anyio.run(run, options.times, options.seed)
    counts = Counter({kind: len(times) for kind, times in found.items()})
    print(f"{sum(counts.values())} faults in {time.monotonic() - begun:.0f} s, all as promised")
    for kind, times in found.items():
        if times:
            print(
                f"{kind:6} {len(times)} times: {statistics.median(times):.3f} s, at most "
                f"{max(times):.3f} s until every stream had ended"
            )


if __name__ == "__main__":
    main()
