"""What several ranks cost or give on this machine, whether they compute the same, and what their
messages would take over NVLink.

    python -m perf.ranks --model smollm2-135m --ranks 2

Engines of one rank with all cores, of ranks that are exact, and of ranks that sum take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import torch
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from engine import AsyncEngine, SamplingParams
from engine.models import load_model
from engine.models.shard import Shard
from engine.weights.checkpoint import open_checkpoint
from engine.weights.sources import resolve
from kernels.backend import TORCH_DTYPES, select_backend
from kernels.collectives import Place, ProcessGroup, join, shared_memory
from kernels.gpu.catalogue import MODELS
from kernels.gpu.roofline import H100, step_seconds
from kernels.tape import Recorder, Tape

# Of an H100: NVLink's bytes a second in one direction, and what a small all-reduce takes inside a
# captured graph (NCCL's, as others have published it; not measured here).
NVLINK_BYTES, NVLINK_SECONDS = 450e9, 9e-6
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a lighthouse keeper who",
    "Water boils at a lower temperature in the mountains because",
    "Dear Sir or Madam, I am writing to",
    "The three laws of thermodynamics say that",
    "In 1815 the Congress of Vienna",
    "To make bread you need",
]


@dataclass(frozen=True)
class Message:
    """A collective of a step: its kind, and the fp32 values that each row brings to it."""

    op: str
    width: int
    rows: str


def messages_of(tape: Tape) -> list[Message]:
    """Every collective of a recorded forward pass."""
    return [
        Message(i.op, i.results[0].width, i.results[0].rows.value)
        for i in tape.instructions
        if i.op in ("all_reduce", "all_gather")
    ]


def record(path: Path, ranks: int, *, exact: bool) -> Tape:
    """What the first of so many ranks does in a step."""
    backend, _ = select_backend("auto", dtype="auto", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(path), backend, shard=Shard(0, ranks), exact=exact)
    recorder = Recorder()
    return recorder.finish(model.forward(recorder))


def collective_seconds(kind: str, ranks: int, rows: int, width: int) -> float:
    """Median seconds of an all-reduce of fp32 `[rows, width]` between processes."""
    memory = shared_memory()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        place = Place(rank, ranks, memory)
        group = join(place, "cpu") if kind == "shared" else ProcessGroup(place, "gloo")
        x, times = torch.ones(rows, width), []
        for _ in range(400):
            start = time.perf_counter()
            group.all_reduce(x)
            times.append(time.perf_counter() - start)
        if rank == 0:
            sender.send_bytes(json.dumps(statistics.median(times[100:])).encode())

    processes = [context.Process(target=work, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    os.close(memory)
    return float(json.loads(receiver.recv_bytes()))


async def greedy(engine: AsyncEngine, prompt: str, tokens: int) -> list[tuple[int, float]]:
    """Each token with how far the likeliest was ahead of the second, in logprob."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=2, ignore_eos=True)
    found: list[tuple[int, float]] = []
    async for delta in engine.generate(prompt, params):
        found += [(i.token_id, i.top[0][1] - i.top[1][1]) for i in delta.logprobs]
    return found


def compare(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> tuple[int, float]:
    """At which token two texts part (their length if they do not), and the lead there."""
    for place, ((a, lead), (b, _)) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return place, lead
    return len(one), 0.0


async def tokens_per_second(engine: AsyncEngine, streams: int, prompt: int, tokens: int) -> float:
    """Of all streams together."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    async def one(number: int) -> None:
        ids = [3 + (number * 131 + i * 7 + time.monotonic_ns()) % 900 for i in range(prompt)]
        async for _ in engine.generate(ids, params):
            pass

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(streams):
            group.start_soon(one, number)
    return streams * (tokens if tokens > 1 else prompt) / (time.perf_counter() - start)


async def measure(
    model: str, ranks: int, dtype: str, rounds: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """Speed of each kind of engine, in turns, and where its greedy texts part from one rank's."""
    kinds: dict[str, dict[str, Any]] = {
        "one rank": {},
        "exact ranks": {"execution__tensor_parallel": ranks},
        "summing ranks": {"execution__tensor_parallel": ranks, "execution__exact_ranks": False},
    }
    found: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    loads: dict[str, Callable[[AsyncEngine], Any]] = {
        "prefill 512": lambda e: tokens_per_second(e, 1, 512, 1),
        "1 stream": lambda e: tokens_per_second(e, 1, 16, tokens),
        "8 streams": lambda e: tokens_per_second(e, 8, 16, tokens),
        "16 streams": lambda e: tokens_per_second(e, 16, 16, tokens),
    }
    async with AsyncExitStack() as stack:
        engines: dict[str, AsyncEngine] = {}
        for kind, options in kinds.items():
            made = AsyncEngine.from_pretrained(
                model,
                model__dtype=dtype,
                cache__tokens=16384,
                scheduler__speculative_tokens=0,
                **options,
            )
            engines[kind] = await stack.enter_async_context(made)
            found[kind]["timeline"] = dict(engines[kind].parts.timeline)
        for name, load in loads.items():
            speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind, engine in engines.items():
                    speeds[kind].append(await load(engine))
            for kind, every in speeds.items():
                found[kind][name] = statistics.median(every)
        texts = {k: [await greedy(e, p, 64) for p in PROMPTS] for k, e in engines.items()}
        for kind in kinds:
            pairs = zip(texts["one rank"], texts[kind], strict=True)
            found[kind]["parts"] = [compare(one, other) for one, other in pairs]
    return found


def projection(name: str, ranks: int, rows: int) -> tuple[float, float, int]:
    """Seconds of a step of a catalogue model in bfloat16 on one H100 and on `ranks` of them, by the
    roofline and the messages of a summing rank; and how many messages those are."""
    model = next(m for m in MODELS if m.name == name)
    alone = step_seconds(model, H100, rows, 1024)
    width = TORCH_DTYPES["bfloat16"].itemsize
    # Two sums a layer, one behind the embedding; the logits are gathered.
    sums = 2 * model.layers + 1
    moved = sums * rows * model.hidden * width * 2 * (ranks - 1) / ranks
    moved += rows * model.vocab * 4 * (ranks - 1) / ranks
    return alone, alone / ranks + (sums + 1) * NVLINK_SECONDS + moved / NVLINK_BYTES, sums + 1


app = App(name="perf.ranks", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    model: str = "smollm2-135m",
    ranks: int = 2,
    dtype: str = "auto",
    rounds: int = 5,
    tokens: int = 96,
    out: Annotated[Path | None, Parameter(help="Where to write everything, as JSON.")] = None,
) -> None:
    """Measure and print."""
    console = Console(width=100)
    times = {
        (kind, rows, width): collective_seconds(kind, ranks, rows, width)
        for kind in ("shared", "gloo")
        for rows, width in ((1, 576), (1, 4096), (32, 576), (512, 576))
    }
    table = Table("all-reduce, microseconds", "1 x 576", "1 x 4096", "32 x 576", "512 x 576")
    for kind in ("shared", "gloo"):
        table.add_row(kind, *(f"{1e6 * t:.0f}" for (k, *_), t in times.items() if k == kind))
    console.print(table)

    path = resolve(model)
    table = Table("messages of a step", "how many", "values a row")
    for exact in (True, False):
        every = messages_of(record(path, ranks, exact=exact))
        of_tokens = [m for m in every if m.rows == "tokens"]
        kind = "exact ranks" if exact else "summing ranks"
        table.add_row(kind, str(len(every)), str(sum(m.width for m in of_tokens)))
    console.print(table)

    found = anyio.run(measure, model, ranks, dtype, rounds, tokens)
    speeds = [name for name in found["one rank"] if name not in ("timeline", "parts")]
    table = Table("tokens/s", *speeds)
    for kind, values in found.items():
        ratios = [values[s] / found["one rank"][s] for s in speeds]
        cells = [f"{values[s]:.0f} ({r:.2f})" for s, r in zip(speeds, ratios, strict=True)]
        table.add_row(kind, *cells)
    console.print(table)
    for kind, values in found.items():
        same = sum(place == 64 for place, _ in values["parts"])
        leads = [f"{lead:.1e}" for place, lead in values["parts"] if place < 64]
        where = (
            f"; where they part the likeliest token leads by {', '.join(leads)}" if leads else ""
        )
        console.print(f"{kind}: {same} of {len(PROMPTS)} greedy texts are one rank's{where}")

    table = Table("projected, H100, bfloat16", "ranks", "one ms", "ranks ms", "faster", "messages")
    for name, rows in (("Llama-3.1-8B", 1), ("Llama-3.1-8B", 64), ("Llama-3.2-1B", 1)):
        for count in (2, 4):
            alone, together, many = projection(name, count, rows)
            table.add_row(
                f"{name}, {rows} rows",
                str(count),
                f"{1e3 * alone:.2f}",
                f"{1e3 * together:.2f}",
                f"{alone / together:.2f}",
                str(many),
            )
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    app()
