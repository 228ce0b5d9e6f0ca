"""The cache's narrow formats: what they lose, and pages that change from one into another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheDType, CacheLayout
from kernels.cpu.native_backend import NativeBackend
from kernels.cpu.native_program import NativeProgram
from kernels.ops import Heads, Rope
from kernels.reference import ReferenceOps
from kernels.tape import Recorder
from kernels.torch_backend import TorchBackend
from tests.kernels.native import INSTRUCTION_SETS, Host, chunks_batch, needs_native
from tests.tiny import write_llama

pytestmark = needs_native
PAGES = 8
TOKENS = np.random.default_rng(1).integers(0, 260, 100).tolist()
TABLE = np.arange(PAGES)[None]


def served(
    folder: Path, cache: CacheDType, instructions: str = "auto"
) -> tuple[NativeBackend, NativeProgram]:
    """A model of one layer, whose keys and values no attention comes before."""
    path = write_llama(folder / cache, head_dim=64, num_hidden_layers=1)
    backend = NativeBackend("float32", 2, instructions)
    model = load_model(open_checkpoint(path), backend)
    backend.allocate_cache(CacheLayout((model.config.heads,), 16, cache, 512), PAGES)
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    return backend, backend.compile(tape, 512)


def floats(backend: NativeBackend) -> list[torch.Tensor]:
    """Keys and values of a float32 cache, `[pages, heads, tokens, dim]`."""
    keys, values = (torch.from_numpy(part.view(np.float32)) for part in backend.cache_parts())
    return [
        keys.reshape(PAGES, 2, 64, 16).transpose(2, 3).clone(),
        values.reshape(PAGES, 2, 16, 64).clone(),
    ]


def hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def round_trip(backend: NativeBackend, dtype: CacheDType) -> None:
    """Every page through a block of the codec's and back."""
    codec = backend.page_codec(dtype)
    blocks = np.zeros((PAGES, codec.page_bytes + 63), np.uint8)
    for page, block in enumerate(blocks):
        start = -block.ctypes.data % 64
        codec.compress(page, block[start : start + codec.page_bytes])
    for part in backend.cache_parts():
        part[:] = 77
    for page, block in enumerate(blocks):
        start = -block.ctypes.data % 64
        codec.restore(block[start : start + codec.page_bytes], page)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_int4_loses_half_a_step_of_its_group(tmp_path: Path, instructions: str) -> None:
    backend, program = served(tmp_path, "float32", instructions)
    program.forward(chunks_batch([TOKENS], [0], TABLE, 16))
    before = floats(backend)
    round_trip(backend, "int4")
    after = floats(backend)
    before[0], after[0] = before[0] @ hadamard(64), after[0] @ hadamard(64)  # keys lie so
    for old, new in zip(before, after, strict=True):
        groups = old.reshape(PAGES, 2, 16, 2, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        error = (new - old).abs().reshape(groups.shape).amax(-1)
        assert (error <= step * 0.52 + groups.abs().amax(-1) / 1024).all()
        assert (error > step * 0.3).any()


def test_int8_loses_half_a_step_of_its_vector(tmp_path: Path) -> None:
    backend, program = served(tmp_path, "float32")
    program.forward(chunks_batch([TOKENS], [0], TABLE, 16))
    before = floats(backend)
    round_trip(backend, "int8")
    for old, new in zip(before, floats(backend), strict=True):
        step = old.abs().amax(-1) / 127
        assert ((new - old).abs().amax(-1) <= step * 0.501).all()


@pytest.mark.parametrize(
    ("stored", "kept", "bound"),
    [("bfloat16", "int8", 0.02), ("bfloat16", "int4", 0.2), ("int8", "int4", 0.2)],
)
def test_pages_of_any_format_come_back_close(
    tmp_path: Path, stored: CacheDType, kept: CacheDType, bound: float
) -> None:
    backend, program = served(tmp_path, stored)
    step = chunks_batch([TOKENS[-1:]], [99], TABLE, 16)
    program.forward(chunks_batch([TOKENS], [0], TABLE, 16))
    program.forward(step)
    expected = program.logits()[0].clone()
    round_trip(backend, kept)
    program.forward(step)
    error = (program.logits()[0] - expected).abs().max() / expected.abs().max()
    assert 0 < error < bound, float(error)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_attention_over_int4_is_that_over_what_it_holds(tmp_path: Path, instructions: str) -> None:
    """Against float attention over the same rounded keys and values."""
    step: Any = chunks_batch([TOKENS[-1:]], [99], TABLE, 16)
    results = []
    for cache in ("float32", "int4"):
        backend, program = served(tmp_path, cache, instructions)
        program.forward(chunks_batch([TOKENS], [0], TABLE, 16))
        if cache == "float32":
            round_trip(backend, "int4")
        program.forward(step)
        results.append(program.logits()[0].clone())
    error = (results[0] - results[1]).abs().max() / results[0].abs().max()
    assert error < 0.03, float(error)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(
    ("cache", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2), ("int8", 2e-2), ("int4", 0.2)]
)
@pytest.mark.parametrize(("dim", "scale"), [(32, 0.3), (512, 0.06)])
def test_sinks_take_their_share_of_every_heads_attention(
    cache: CacheDType, bound: float, window: int, instructions: str, dim: int, scale: float
) -> None:
    """Against the reference, in chunks of many rows and of one, one sink above all scores, with
    heads of a usual width and the widest."""
    heads = Heads(6, 2, dim)
    generator = torch.Generator().manual_seed(3)
    values = {
        "table": torch.randn(300, heads.qkv_width, generator=generator),
        "sinks": torch.tensor([-9.0, -1.0, 0.0, 1.0, 4.0, 90.0]),
        "unit": torch.eye(heads.query * heads.dim),
    }
    rope = Rope(tuple(10.0 ** -(n / dim * 32) for n in range(dim // 2)))
    results = []
    for backend in (
        NativeBackend("float32", 2, instructions),
        TorchBackend("reference", ReferenceOps, "float32"),
    ):
        placed = {name: backend.load([Host(value)]) for name, value in values.items()}
        dtype: CacheDType = cache if isinstance(backend, NativeBackend) else "float32"
        backend.allocate_cache(CacheLayout((heads,), 16, dtype, 512), PAGES)
        recorder = Recorder()
        q = recorder.rope_write_kv(recorder.embed(placed["table"], 1.0), 0, heads, rope, None)
        y = recorder.attention(q, 0, heads, scale, window, placed["sinks"])
        y = recorder.linear(recorder.select_rows(y), placed["unit"])
        program = backend.compile(recorder.finish(y), 512)
        made, start = [], 0
        for count in (40, 1, 1, 9):
            program.forward(chunks_batch([TOKENS[start : start + count]], [start], TABLE, 16))
            made.append(program.logits().clone())
            start += count
        results.append(torch.cat(made))
    found, expected = results
    assert (found - expected).norm() / expected.norm() < bound
    assert not expected[:, 5 * dim :].abs().max() > 1e-6, "the last head's sink takes everything"


def test_a_codec_makes_pages_smaller_or_is_refused(tmp_path: Path) -> None:
    backend, _ = served(tmp_path, "int8")
    for dtype in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match="but the cache itself is int8"):
            backend.page_codec(dtype)
    assert backend.page_codec("int4").page_bytes == 2 * 2 * 16 * (32 + 8)


@pytest.mark.parametrize(("stored", "kept"), [("bfloat16", "int8"), ("float32", "int4")])
def test_layers_of_several_widths_lie_behind_each_other(
    stored: CacheDType, kept: CacheDType
) -> None:
    backend = NativeBackend("float32", 2)
    heads = (Heads(2, 1, 32), Heads(2, 2, 64), Heads(4, 1, 128))
    backend.allocate_cache(CacheLayout(heads, 16, stored, 512), PAGES)
    generator = np.random.default_rng(0)
    parts = backend.cache_parts()
    dtype = torch.float32 if stored == "float32" else torch.bfloat16
    for part in parts:
        count = part.shape[1] // dtype.itemsize
        numbers = torch.from_numpy(generator.standard_normal((PAGES, count)).astype(np.float32))
        part[:] = numbers.to(dtype).view(torch.uint8).numpy()
    before = [part.copy() for part in parts]
    round_trip(backend, kept)
    for old, new in zip(before, backend.cache_parts(), strict=True):
        a, b = (torch.from_numpy(x.copy()).view(dtype).float() for x in (old, new))
        assert float((a - b).norm() / a.norm()) < (0.01 if kept == "int8" else 0.15)
