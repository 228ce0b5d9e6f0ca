"""Weights, batches and programs for the tests of the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout
from kernels.batch import Batch
from kernels.cpu.native_backend import NativeBackend, native_module, unavailable_reason
from kernels.cpu.native_program import NativeProgram
from kernels.ops import Heads
from kernels.tape import Recorder, Tape

reason = unavailable_reason()
needs_native = pytest.mark.skipif(reason is not None, reason=f"native kernels: {reason}")
_native = native_module()
INSTRUCTION_SETS: list[str] = _native.instruction_sets() if _native is not None else []


@dataclass(frozen=True, eq=False)
class Host:
    """A tensor of a checkpoint that exists only here."""

    values: torch.Tensor
    format: str = "F32"
    blocks: torch.Tensor | None = None
    name: str = "w"
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def block(self) -> int:
        kinds = Type.__members__
        return gguf.GGML_QUANT_SIZES[kinds[self.format]][0] if self.format in kinds else 1

    def narrow(self, dimension: int, start: int, length: int) -> Host:
        assert dimension == 0, "only rows are needed here"
        blocks = None if self.blocks is None else self.blocks.narrow(0, start, length)
        return replace(self, values=self.values.narrow(0, start, length), blocks=blocks)

    def dense(self) -> torch.Tensor:
        return self.values

    def packed(self) -> torch.Tensor:
        assert self.blocks is not None
        return self.blocks

    def signs(self) -> torch.Tensor:
        assert self.blocks is not None
        return self.blocks


def quantized(
    kind: Type, rows: int, columns: int, seed: int = 0, values: torch.Tensor | None = None
) -> Host:
    """Random weights, or these, as ggml blocks, and the blocks' exact values."""
    raw = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    raw = raw if values is None else values.numpy()
    blocks = gguf.quantize(raw, kind)
    return Host(
        torch.from_numpy(gguf.dequantize(blocks, kind)), kind.name, torch.from_numpy(blocks)
    )


def batch_of(tokens: Sequence[int], samples: Sequence[int]) -> Batch:
    """Rows without a past; nothing of it touches pages."""
    count = len(tokens)
    return Batch(
        token_ids=np.array(tokens, np.int64),
        positions=np.arange(count),
        kv_slots=np.arange(count),
        query_starts=np.array([0, count], np.int32),
        context_lengths=np.array([count], np.int32),
        table_rows=np.zeros(1, np.int32),
        page_table=np.zeros((1, 1), np.int32),
        sample_rows=np.array(samples, np.int64),
    )


def run_linear(
    weight: Host | list[Host],
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    threads: int = 2,
    instructions: str = "auto",
    weights: Any = "auto",
) -> torch.Tensor:
    """`x @ weight.T (+ bias)` through a program: the inputs are the rows of an embedding table.
    Several weights are laid below each other."""
    backend = NativeBackend(weights, threads, instructions)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "bfloat16", 16), 1)
    # The table is never rounded, so that every activation can be had.
    table = NativeBackend("float32", 1, instructions).load([Host(x)])
    parts = weight if isinstance(weight, list) else [weight]
    placed = backend.load(parts, [Host(bias)] if bias is not None else [])
    recorder = Recorder()
    hidden = recorder.select_rows(recorder.embed(table, 1.0))
    program = backend.compile(recorder.finish(recorder.linear(hidden, placed)), len(x))
    program.forward(batch_of(range(len(x)), range(len(x))))
    return program.logits().clone()


def groups_of(x: torch.Tensor) -> torch.Tensor:
    """Activations as int8 groups of 32 hold them."""
    shaped = x.view(len(x), -1, 32)
    largest = shaped.abs().amax(-1, keepdim=True)
    # A scalar numerator would make torch multiply by a rounded reciprocal.
    inverse = torch.where(largest < 1e-35, 0, torch.full_like(largest, 127) / largest)
    return ((shaped * inverse).round() * (largest / 127)).view(x.shape)


def program_of(
    path: Path,
    *,
    threads: int = 2,
    page_size: int = 16,
    pages: int = 40,
    weights: Any = "auto",
    cache: Any = "bfloat16",
    instructions: str = "auto",
) -> tuple[NativeProgram, Tape]:
    backend = NativeBackend(weights, threads, instructions)
    model = load_model(open_checkpoint(path), backend)
    layout = cache_layout(model, page_size, cache, model.config.max_context)
    backend.allocate_cache(layout, pages, states=8)
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    return backend.compile(tape, 512), tape


def chunks_batch(
    tokens: list[list[int]], starts: list[int], tables: np.ndarray[Any, Any], size: int
) -> Batch:
    """One chunk for each sequence: `tokens[i]` from position `starts[i]`; all rows sampled."""
    counts = [len(t) for t in tokens]
    positions = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
    rows = np.repeat(np.arange(len(tokens)), counts)
    return Batch(
        token_ids=np.concatenate([np.array(t, np.int64) for t in tokens]),
        positions=positions,
        kv_slots=tables[rows, positions // size].astype(np.int64) * size + positions % size,
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        context_lengths=(np.array(starts) + counts).astype(np.int32),
        table_rows=np.arange(len(tokens), dtype=np.int32),
        page_table=tables.astype(np.int32),
        sample_rows=np.arange(len(positions), dtype=np.int64),
    )


def logits_in_chunks(
    program: NativeProgram, tokens: list[int], chunks: Sequence[int], size: int = 16
) -> torch.Tensor:
    table = np.random.default_rng(0).permutation(30)[None, : -(-len(tokens) // size)]
    logits, start = [], 0
    for count in chunks:
        part = tokens[start : start + count]
        program.forward(chunks_batch([part], [start], table, size))
        logits.append(program.logits().clone())
        start += count
    return torch.cat(logits)
