"""Gemma 4, whose layers differ in their heads, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.gpu.backend import GpuBackend
from kernels.gpu.pointwise import PointwiseOps
from tests.engine.models.test_ranks import tiny
from tests.kernels.gpu.filled import HOST, program_of
from tests.kernels.gpu.test_program import SIZE, logits_of, reference_logits

LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


def written(folder: Path, family: str) -> Path:
    more = {"vocab_size_per_layer_input": 260} if family == "gemma4" else {}
    return tiny(folder, family, vocab_size=260, **LAYERS, **more)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gemma4"), "gemma4")


@pytest.fixture(scope="module", params=["gemma4", "gemma4-experts"])
def folder(
    request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One with a vector for each layer, which shares keys, and one with keys as values."""
    if request.param == "gemma4":
        return small
    return written(tmp_path_factory.mktemp(request.param), request.param)


def test_the_logits_are_the_references(folder: Path) -> None:
    expected = reference_logits(folder)
    for ours, theirs in zip(logits_of(program_of(folder)[0]), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert float(ours.abs().max()) < 5.0, "logits stay below their cap"


def test_int8_pages_are_close(small: Path) -> None:
    found = logits_of(program_of(small, cache="int8")[0])
    for ours, theirs in zip(found, reference_logits(small), strict=True):
        rows = (ours - theirs).abs().amax(1) / theirs.abs().max()
        assert float(rows.median()) < 0.05


@pytest.fixture(scope="module")
def backend(folder: Path) -> GpuBackend:
    """Pages of layers with heads of two widths."""
    made = GpuBackend("float32", "float32", HOST)
    model = load_model(open_checkpoint(folder), made)
    made.allocate_cache(cache_layout(model, SIZE, "float32", 64), 8)
    generator = torch.Generator().manual_seed(0)
    for tensor in made._tensors[False]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return made


def test_a_page_is_moved_in_every_layer(backend: GpuBackend) -> None:
    pages = backend.pages()
    block = np.zeros(pages.page_bytes, np.uint8)
    assert pages.page_bytes == backend._layout.bytes_per_page
    pages.read(2, block)
    pages.write(block, 5)
    pages.copy(5, 6)
    for cache in backend._caches:
        for part in (cache.keys, cache.values):
            whole = part.view(8, -1)
            assert torch.equal(whole[5], whole[2])
            assert torch.equal(whole[6], whole[2])


def test_a_page_is_made_small_in_every_layer(backend: GpuBackend) -> None:
    codec = backend.page_codec("int8")
    block = np.zeros(codec.page_bytes, np.uint8)
    codec.compress(1, block)
    codec.restore(block, 7)
    for cache in backend._caches:
        for part in (cache.keys, cache.values):
            vectors = part.view(8, -1, part.shape[2])
            bound = vectors[1].abs().amax(-1, keepdim=True) / 254 * 1.01
            assert bool(((vectors[7] - vectors[1]).abs() <= bound).all())


def test_what_is_added_gated_or_capped_is_so_value_by_value() -> None:
    """Of rows wider than a block, and from a column on."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 1500, generator=generator) * 4 for _ in range(2))
    ops = PointwiseOps()
    assert torch.equal(ops.add(x, y), x + y)
    gate = y[:, :1100].contiguous()
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    cut = x[:, 300:1400]
    torch.testing.assert_close(
        ops.gate(x, gate, "gelu_tanh", 300), cut * gelu, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ops.gate(x, y, "sigmoid"), x * y.sigmoid())
    capped = 3 * torch.tanh(x / 3)
    torch.testing.assert_close(ops.softcap(x, 3.0), capped, rtol=1e-5, atol=1e-5)
