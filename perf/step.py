"""Where a step's time goes: plan, fill, forward, sample, commit, stream; and the loop's lag.

`loop_cpu_us` is the processor time that the event loop's thread took a step, `alone_us` the same
forward pass with nothing beside it, and `slowed_us` how much longer it takes, in turns with that,
beside a thread that takes as much of a core as the loop did (of native kernels; a step of torch's
may wait for the interpreter as well).

python -m perf.step --model smollm2-135m --streams 1,8,32
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import anyio
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from engine import AsyncEngine, RequestStats, SamplingParams, StepStats

PARTS = ("plan", "fill", "forward", "sample", "commit", "stream")
LAG_INTERVAL = 0.004
# Of each of the two: the forward pass alone, and beside somebody.
TURNS = 100
# When that one begins, counted from the step's begin; the loop does most of its work then.
ENTERS_SECONDS = 0.0005
REST_INTERVAL, REST_SECONDS = 0.2, 30.0


class StepRecorder:
    """Keeps every steady decode step, the loop's processor time at each, and the last as the runner
    got it ready."""

    def __init__(self, streams: int, runner: Any) -> None:
        self._streams = streams
        self._runner = runner
        self.steps: list[StepStats] = []
        self.loop_seconds: list[float] = []
        self.last: Any = None

    def on_step(self, stats: StepStats) -> None:
        if stats.prefill_tokens == 0 and stats.decode_rows == self._streams:
            self.steps.append(stats)
            self.loop_seconds.append(time.thread_time())
            self.last = self._runner._last

    def on_request(self, stats: RequestStats) -> None:
        pass


async def measure(
    model: str, streams: int, prompt_tokens: int, tokens: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Medians over steady decode steps of `streams` sequences, in microseconds."""
    lags: list[float] = []
    # All prompts at once, so that all sequences decode together soon.
    settings = {"scheduler__target_itl_ms": 250.0, "scheduler__speculative_tokens": 0} | settings
    async with AsyncEngine.from_pretrained(model, **settings) as engine:
        runner: Any = engine.parts.stepper._executor  # type: ignore[attr-defined]
        recorder = StepRecorder(streams, runner)
        engine.add_listener(recorder)
        vocabulary = min(engine.parts.vocab_size, 1000)

        async def stream(number: int) -> None:
            prompt = [(number * 131 + i * 7) % (vocabulary - 3) + 3 for i in range(prompt_tokens)]
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
            async for _ in engine.generate(prompt, params):
                pass

        async def watch() -> None:
            while True:
                start = time.perf_counter()
                await anyio.sleep(LAG_INTERVAL)
                lags.append(time.perf_counter() - start - LAG_INTERVAL)

        async with anyio.create_task_group() as outer:
            outer.start_soon(watch)
            async with anyio.create_task_group() as group:
                for number in range(streams):
                    group.start_soon(stream, number)
            outer.cancel_scope.cancel()
        steps = recorder.steps
        if recorder.last is None or len(steps) < 2:
            raise SystemExit("too few steady steps were seen; ask for more tokens")
        loop = statistics.median(b - a for a, b in itertools.pairwise(recorder.loop_seconds))
        await at_rest()
        alone, slowed = forward_beside(runner, recorder.last, loop)
    medians = {p: statistics.median(s.seconds[p] for s in steps) * 1e6 for p in PARTS}
    between = [b.at - a.at for a, b in itertools.pairwise(steps)]
    whole = statistics.median(between) * 1e6
    lags.sort()
    return {
        "streams": streams,
        "steps": len(steps),
        **{f"{part}_us": round(value, 1) for part, value in medians.items()},
        "step_us": round(whole, 1),
        "alone_us": round(alone * 1e6, 1),
        "loop_cpu_us": round(loop * 1e6, 1),
        "slowed_us": round(slowed * 1e6, 1),
        "python_us": round(sum(medians[p] for p in ("plan", "fill", "commit", "stream")), 1),
        "tokens_per_second": round(streams / whole * 1e6, 1),
        "loop_lag_p50_us": round(statistics.median(lags) * 1e6, 1),
        "loop_lag_p99_us": round(lags[int(len(lags) * 0.99)] * 1e6, 1),
    }


async def at_rest() -> None:
    """Wait until the process has nothing more to do: where no step runs, memory is taken ahead."""
    spent = float("inf")
    with anyio.fail_after(REST_SECONDS):
        while spent > 0.1 * REST_INTERVAL:
            before = time.process_time()
            await anyio.sleep(REST_INTERVAL)
            spent = time.process_time() - before


def take_core(seconds: float) -> None:
    """Wait for a step to be under way, and take so much of a core."""
    time.sleep(ENTERS_SECONDS)
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def forward_beside(runner: Any, step: Any, seconds: float) -> tuple[float, float]:
    """Median seconds of the forward pass of one step while nothing else runs, and how much longer
    it takes beside a thread that takes so many seconds of a core."""
    alone, beside = [], []
    for _ in range(TURNS):
        alone.append(float(runner.run(step).seconds["forward"]))
        neighbour = threading.Thread(target=take_core, args=(seconds,))
        neighbour.start()
        beside.append(float(runner.run(step).seconds["forward"]))
        neighbour.join()
    return statistics.median(alone), statistics.median(beside) - statistics.median(alone)


app = App(name="perf.step", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    model: str = "smollm2-135m",
    streams: Annotated[str, Parameter(help="Comma-separated batch sizes.")] = "1,8,32",
    prompt_tokens: int = 128,
    tokens: int = 64,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure each batch size in an engine of its own, and print one table."""
    pairs = (item.split("=", 1) for item in set_)
    settings = {key.replace(".", "__"): _value(value) for key, value in pairs}
    results = [
        anyio.run(measure, model, int(count), prompt_tokens, tokens, settings)
        for count in streams.split(",")
    ]
    table = Table(*results[0])
    for result in results:
        table.add_row(*(str(value) for value in result.values()))
    Console(width=200).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    app()
