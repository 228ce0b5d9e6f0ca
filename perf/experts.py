"""Steps of a mixture of experts with random weights, in the native kernels, without a server.

python -m perf.experts --layers 4 --keep model.gguf
python -m perf.experts --model gpt-oss-20b --layers 4

Sizes are those of Qwen3-30B-A3B, of whose 128 experts a token goes through 8, or of gpt-oss-20b (4
of 32, in MXFP4), but for the number of layers. The file can be given to another program, such as
llama.cpp's `llama-batched-bench`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import gguf
import numpy as np
import numpy.typing as npt
from cyclopts import App, Parameter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import Program, available_cores
from kernels.batch import Batch
from kernels.cpu.native_backend import NativeBackend
from kernels.ops import Heads
from kernels.tape import Recorder

VOCAB = 32768
PAGE, CONTEXT, MOST_ROWS = 16, 1024, 512
RUNS = 9


@dataclass(frozen=True)
class Sizes:
    """A model's, and the ggml types of its experts and of all else."""

    architecture: str
    hidden: int
    wide: int
    experts: int
    used: int
    heads: Heads
    kind: GGMLQuantizationType
    dense: GGMLQuantizationType


SIZES = {
    "qwen3-30b": Sizes(
        "qwen3moe", 2048, 768, 128, 8, Heads(32, 4, 128),
        GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_0,
    ),
    "gpt-oss-20b": Sizes(
        "gpt-oss", 2880, 2880, 32, 4, Heads(64, 8, 64),
        GGMLQuantizationType.MXFP4, GGMLQuantizationType.Q8_0,
    ),
}  # fmt: skip


def random_blocks(
    rng: np.random.Generator, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """Blocks with random numbers under one scale, of about a hundredth."""
    block, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
    if kind is GGMLQuantizationType.MXFP4:
        blocks[:, 0] = 121
    else:
        scale = np.float16(0.01 if kind is GGMLQuantizationType.Q4_0 else 0.001)
        blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def write_header(writer: gguf.GGUFWriter, sizes: Sizes, layers: int) -> None:
    """All but the tensors; there is no tokenizer."""
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(3 * sizes.hidden)
    writer.add_head_count(sizes.heads.query)
    writer.add_head_count_kv(sizes.heads.kv)
    writer.add_key_length(sizes.heads.dim)
    writer.add_value_length(sizes.heads.dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(sizes.used)
    writer.add_expert_feed_forward_length(sizes.wide)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    if sizes.architecture == "gpt-oss":
        writer.add_sliding_window(128)


def write_model(path: Path, sizes: Sizes, layers: int) -> None:
    """A GGUF file with random weights."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, sizes.architecture)
    write_header(writer, sizes, layers)
    hidden, wide, count, heads = sizes.hidden, sizes.wide, sizes.experts, sizes.heads

    def matrix(name: str, *shape: int, kind: GGMLQuantizationType = sizes.dense) -> None:
        writer.add_tensor(f"{name}.weight", random_blocks(rng, kind, shape), raw_dtype=kind)

    def floats(name: str, *shape: int, mean: float = 0.0, spread: float = 0.05) -> None:
        values: npt.NDArray[np.float32] = rng.normal(mean, spread, shape).astype(np.float32)
        writer.add_tensor(name, values)

    matrix("token_embd", VOCAB, hidden)
    matrix("output", VOCAB, hidden)
    floats("output_norm.weight", hidden, mean=1.0)
    for layer in range(layers):
        block = f"blk.{layer}."
        projections = {
            "attn_q": (heads.query * heads.dim, hidden),
            "attn_k": (heads.kv * heads.dim, hidden),
            "attn_v": (heads.kv * heads.dim, hidden),
            "attn_output": (hidden, heads.query * heads.dim),
        }
        experts = {
            "ffn_gate_exps": (count, wide, hidden),
            "ffn_up_exps": (count, wide, hidden),
            "ffn_down_exps": (count, hidden, wide),
        }
        for name, shape in projections.items():
            matrix(block + name, *shape)
        for name, stack in experts.items():
            matrix(block + name, *stack, kind=sizes.kind)
        floats(f"{block}ffn_gate_inp.weight", count, hidden)
        if sizes.architecture == "gpt-oss":
            for name, shape in {**projections, "ffn_gate_inp": (count, hidden)}.items():
                floats(f"{block}{name}.bias", shape[0])
            for name, stack in experts.items():
                floats(f"{block}{name}.bias", *stack[:2])
            floats(f"{block}attn_sinks.weight", heads.query)
        second = "post_attention_norm" if sizes.architecture == "gpt-oss" else "ffn_norm"
        norms = {"attn_norm": hidden, second: hidden}
        if sizes.architecture == "qwen3moe":
            norms |= {"attn_q_norm": heads.dim, "attn_k_norm": heads.dim}
        for name, width in norms.items():
            floats(f"{block}{name}.weight", width, mean=1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def program_of(path: Path, threads: int, sequences: int) -> Program:
    """The model on the native kernels, with pages for so many sequences."""
    backend = NativeBackend("auto", threads)
    model = load_model(open_checkpoint(path), backend)
    layout = cache_layout(model, PAGE, "bfloat16", CONTEXT)
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
    model: Annotated[Literal["qwen3-30b", "gpt-oss-20b"], Parameter(help="Whose sizes.")] = (
        "qwen3-30b"
    ),
    layers: Annotated[int, Parameter(help="Layers; the real models have 48 and 24.")] = 4,
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
