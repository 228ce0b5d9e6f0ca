"""Steps of models with random weights, in the native kernels, without a server.

python -m perf.families --layers 4 --keep model.gguf
python -m perf.families --model gpt-oss-20b --layers 4
python -m perf.families --model qwen3.5-0.8b --layers 24
python -m perf.families --model gemma4-e2b --layers 35

Sizes are those of Qwen3-30B-A3B, of whose 128 experts a token goes through 8, of gpt-oss-20b (4 of
32, in MXFP4), of Qwen3.5-0.8B (delta nets) or of Gemma 4 E2B, but for the number of layers and
tokens. The file can be given to another program, such as llama.cpp's `llama-batched-bench`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import Program, available_cores
from kernels.batch import Batch
from kernels.cpu.native_backend import NativeBackend
from kernels.tape import Recorder
from perf.random_model import CONTEXT, SIZES, VOCAB, write_model

PAGE, MOST_ROWS = 16, 512
RUNS = 9
Model = Literal["qwen3-30b", "gpt-oss-20b", "qwen3.5-0.8b", "gemma4-e2b"]


def program_of(path: Path, threads: int, sequences: int) -> Program:
    """The model on the native kernels, with pages for so many sequences."""
    backend = NativeBackend("auto", threads)
    model = load_model(open_checkpoint(path), backend)
    layout = cache_layout(model, PAGE, "bfloat16", CONTEXT)
    backend.allocate_cache(layout, sequences * CONTEXT // PAGE, states=sequences)
    recorder = Recorder()
    return backend.compile(recorder.finish(model.forward(recorder)), MOST_ROWS)


def batch_of(rng: np.random.Generator, counts: list[int], before: int) -> Batch:
    """Chunks of random tokens, each behind `before` others; the last of each is sampled."""
    pages = CONTEXT // PAGE
    table = np.arange(len(counts) * pages, dtype=np.int32).reshape(len(counts), pages)
    positions = np.concatenate([np.arange(before, before + count) for count in counts])
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum([0, *counts]).astype(np.int32)
    return Batch(
        token_ids=rng.integers(0, VOCAB, len(positions)),
        positions=positions,
        kv_slots=table[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        query_starts=starts,
        context_lengths=(np.array(counts) + before).astype(np.int32),
        table_rows=np.arange(len(counts), dtype=np.int32),
        page_table=table,
        sample_rows=starts[1:].astype(np.int64) - 1,
    )


def seconds_of(program: Program, counts: list[int], before: int) -> float:
    """The median time of such a step; the first runs touch the pages."""
    rng = np.random.default_rng(1)
    times = []
    for _ in range(RUNS):
        batch = batch_of(rng, counts, before)
        start = time.perf_counter()
        program.forward(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


app = App(name="perf.families", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    model: Annotated[Model, Parameter(help="Whose sizes.")] = ("qwen3-30b"),
    layers: Annotated[
        int, Parameter(help="The real models have 48, 24, 24 and 35; Gemma 4 takes 10.")
    ] = 4,
    decodes: Annotated[str, Parameter(help="Sequences a step, with commas.")] = "1,4,16,32",
    prompts: Annotated[str, Parameter(help="Tokens of a prompt, with commas.")] = "128,512",
    context: Annotated[int, Parameter(help="Tokens before a decode.")] = 48,
    threads: Annotated[int, Parameter(help="0: one a core.")] = 0,
    keep: Annotated[Path | None, Parameter(help="Write the model there, or use what is.")] = None,
) -> None:
    """Write the model, time steps, print a table."""
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "model.gguf"
        if not path.exists():
            write_model(path, SIZES[model], layers)
        rows = [int(count) for count in decodes.split(",")]
        program = program_of(path, threads or available_cores(), max(rows))
        table = Table("step", "ms", "tokens/s")
        cases = [(f"{n} decodes", [1] * n, context) for n in rows]
        cases += [(f"prompt of {n}", [int(n)], 0) for n in prompts.split(",")]
        for name, counts, before in cases:
            seconds = seconds_of(program, counts, before)
            table.add_row(name, f"{seconds * 1e3:.1f}", f"{sum(counts) / seconds:.0f}")
        Console(width=100).print(table)


if __name__ == "__main__":
    app()
