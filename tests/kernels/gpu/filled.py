"""Weights and programs on the GPU backend, in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.models import cache_layout, load_model
from engine.models.shard import Shard
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout
from kernels.collectives import Collectives
from kernels.gpu.backend import GpuBackend
from kernels.gpu.program import GpuProgram
from kernels.gpu.weights import GpuWeight
from kernels.ops import Heads
from kernels.tape import Recorder
from tests.kernels.native import Host, batch_of

HOST = torch.device("cpu")


def gpu_vector(values: torch.Tensor) -> GpuWeight:
    """A norm's weight."""
    return GpuWeight("n", tuple(values.shape), "float", values)


def program_of(
    path: Path,
    *,
    weights: Any = "float32",
    cache: Any = "float32",
    page_size: int = 4,
    pages: int = 129,
    rows: int = 32,
    sequences: int = 4,
    invariant: bool = False,
    collectives: Collectives | None = None,
    window_pages: int = 0,
) -> tuple[GpuProgram, GpuBackend]:
    """A model from a checkpoint, or a rank's shard of one."""
    dtype = "float32" if weights in ("float32", "auto") else "bfloat16"
    backend = GpuBackend(
        weights,
        dtype,  # type: ignore[arg-type]
        HOST,
        invariant=invariant,
        collectives=collectives,
    )
    shard = Shard() if collectives is None else Shard(collectives.rank, collectives.ranks)
    model = load_model(open_checkpoint(path), backend, shard=shard)
    config = model.config
    context = min(config.max_context, 256)
    layout = cache_layout(model, page_size, cache, context)
    backend.allocate_cache(layout, pages, states=8, window_pages=window_pages)
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    return backend.compile(tape, rows, sequences), backend


def run_linear(
    weight: Host,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weights: Any = "auto",
    invariant: bool = False,
) -> torch.Tensor:
    """`x @ weight.T (+ bias)` in fp32; the inputs are the rows of an embedding table."""
    backend = GpuBackend(weights, "float32", HOST, invariant=invariant)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "float32", 16), 8)
    table = GpuBackend("float32", "float32", HOST).load([Host(x)])
    placed = backend.load([weight], [Host(bias)] if bias is not None else [])
    recorder = Recorder()
    hidden = recorder.select_rows(recorder.embed(table, 1.0))
    tape = recorder.finish(recorder.linear(hidden, placed))
    program = backend.compile(tape, len(x), len(x))
    program.forward(batch_of(range(len(x)), range(len(x))))
    return program.logits().clone()
