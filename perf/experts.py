"""Steps of a mixture of experts with random weights, in the native kernels, without a server.

python -m perf.experts --layers 4 --keep model.gguf

Sizes are those of Qwen3-30B-A3B but for the number of layers: 128 experts, of which a token goes
through 8. The file can be given to another program, such as llama.cpp's `llama-batched-bench`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import numpy.typing as npt
from cyclopts import App, Parameter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout, Program, available_cores
from kernels.batch import Batch
from kernels.cpu.native_backend import NativeBackend
from kernels.ops import Heads, Recorder

HIDDEN, WIDE, EXPERTS, USED, VOCAB = 2048, 768, 128, 8, 32768
HEADS = Heads(32, 4, 128)
PAGE, CONTEXT, MOST_ROWS = 16, 1024, 512
RUNS = 9
KIND = GGMLQuantizationType.Q4_0


def write_model(path: Path, layers: int) -> None:
    """A GGUF file of `qwen3moe` with random 4-bit weights and no tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(3 * HIDDEN)
    writer.add_head_count(HEADS.query)
    writer.add_head_count_kv(HEADS.kv)
    writer.add_key_length(HEADS.dim)
    writer.add_value_length(HEADS.dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    writer.add_expert_feed_forward_length(WIDE)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")

    def matrix(name: str, *shape: int) -> None:
        block, size = GGML_QUANT_SIZES[KIND]
        blocks = rng.integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        data = blocks.reshape(*shape[:-1], shape[-1] // block * size)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=KIND)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    matrix("output", VOCAB, HIDDEN)
    ones("output_norm", HIDDEN)
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm, width in (
            ("attn_norm", HIDDEN), ("ffn_norm", HIDDEN),
            ("attn_q_norm", HEADS.dim), ("attn_k_norm", HEADS.dim),
        ):  # fmt: skip
            ones(block + norm, width)
        matrix(block + "attn_q", HEADS.query * HEADS.dim, HIDDEN)
        matrix(block + "attn_k", HEADS.kv * HEADS.dim, HIDDEN)
        matrix(block + "attn_v", HEADS.kv * HEADS.dim, HIDDEN)
        matrix(block + "attn_output", HIDDEN, HEADS.query * HEADS.dim)
        router: npt.NDArray[np.float32] = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
        writer.add_tensor(block + "ffn_gate_inp.weight", router / 20)
        matrix(block + "ffn_gate_exps", EXPERTS, WIDE, HIDDEN)
        matrix(block + "ffn_up_exps", EXPERTS, WIDE, HIDDEN)
        matrix(block + "ffn_down_exps", EXPERTS, HIDDEN, WIDE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def program_of(path: Path, threads: int, sequences: int) -> Program:
    """The model on the native kernels, with pages for so many sequences."""
    backend = NativeBackend("auto", threads)
    model = load_model(open_checkpoint(path), backend)
    layout = CacheLayout(model.config.layers, model.config.heads, PAGE, "bfloat16", CONTEXT)
    backend.allocate_cache(layout, sequences * CONTEXT // PAGE)
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


app = App(name="perf.experts", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    layers: Annotated[int, Parameter(help="Layers; the real model has 48.")] = 4,
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
            write_model(path, layers)
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
