"""Multi-head latent attention on the GPU backend, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheDType
from kernels.gpu.attention import MAX_GROUP, AttentionShape
from kernels.gpu.backend import GpuBackend
from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.workspace import Bucket, GpuCache, Workspace
from kernels.ops import LatentHeads, Rope
from kernels.reference import LayerCache, ReferenceOps, TorchWeight
from tests.kernels.gpu.filled import HOST, gpu_vector, program_of
from tests.kernels.gpu.test_attention import MIXTURES, PAGES, SIZE, random_batch
from tests.kernels.gpu.test_program import logits_of, reference_logits
from tests.tiny import DEEPSEEK, write_llama


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("heads", [LatentHeads(4, 32, 16, 8), LatentHeads(5, 48, 8, 20)])
@pytest.mark.parametrize("quantized", [False, True])
def test_latents_are_written_and_attended_to_as_the_reference_does(
    mixture: str, heads: LatentHeads, quantized: bool
) -> None:
    batch = random_batch(np.random.default_rng(1), *MIXTURES[mixture])
    rows, sequences, cached = len(batch.token_ids), len(batch.context_lengths), heads.cached
    generator = torch.Generator().manual_seed(0)
    shape = (PAGES * SIZE, 1, cached.dim)
    before = torch.randn(shape, generator=generator)
    steps = before.abs().amax(-1) / 127
    numbers = (before / steps[..., None]).round()
    if quantized:
        before = numbers * steps[..., None]
    trash = torch.zeros(1, 1, cached.dim)
    kept = torch.cat([numbers if quantized else before, trash])
    scales = torch.cat([steps, torch.zeros(1, 1)])
    kept = kept.to(torch.int8) if quantized else kept
    cache = GpuCache(kept, kept, *((scales, scales) if quantized else ()))
    staging = Staging(rows + 3, sequences + 2, batch.page_table.shape[1], PAGES * SIZE, HOST)
    staging.copy(batch)
    ops = GpuOps([cache], SIZE, staging, Workspace(HOST), torch.float32, 256, False)
    decode = rows == sequences
    ops.bucket = Bucket(rows + (2 if decode else 3), sequences + 2, 1, decode)
    reference = ReferenceOps([LayerCache(before.clone(), before.clone())], SIZE)
    reference.begin(batch)
    widths = (heads.query * heads.rank, heads.query_width, cached.dim)
    given = [torch.randn(ops.bucket.rows, width, generator=generator) for width in widths]
    rope = Rope(tuple(1.0 / 10.0 ** (i / 3) for i in range(heads.turned // 2)), magnitude=1.2)
    norm = 1 + torch.randn(heads.rank, generator=generator) * 0.2
    theirs = TorchWeight("n", (heads.rank,), norm)
    around = (0, heads, rope)
    q = reference.write_latent(*(x[:rows] for x in given), *around, theirs, 1e-5)
    ours = ops.write_latent(*given, *around, gpu_vector(norm), 1e-5)
    assert torch.allclose(ours[:rows], q, atol=1e-5)
    written = kept[:-1].float() * scales[:-1, :, None] if quantized else kept[:-1]
    steps = scales.max() if quantized else 1e-5
    assert torch.allclose(written, reference.caches[0].keys, atol=float(steps))
    reference.caches[0].values.copy_(written)
    reference.caches[0].keys.copy_(written)
    wanted = reference.attention(q, 0, cached, 0.3, 0)
    found = ops.attention(ours, 0, cached, 0.3, 0)[:rows]
    values = (rows, heads.query, cached.dim)
    # What lies behind the latents means nothing.
    found, wanted = (x.view(values)[..., : heads.rank] for x in (found, wanted))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize(("heads", "given", "inputs"), [(3, 40, 24), (2, 80, 80)])
def test_heads_have_weights_of_their_own(rows: int, heads: int, given: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, heads * given, generator=generator)
    weight = torch.randn(heads * 50, inputs, generator=generator)
    ops = GpuOps([], SIZE, Staging(1, 1, 1, 0, HOST), Workspace(HOST), torch.float32, 16, False)
    found = ops.head_linear(x, gpu_vector(weight), heads)
    parts = x.view(rows, heads, given)[..., :inputs]
    wanted = torch.einsum("rhi,hoi->rho", parts, weight.view(heads, 50, inputs)).flatten(1)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_many_heads_share_latents_in_groups_that_registers_hold() -> None:
    for query in (16, 20, 128):
        cached = LatentHeads(query, 512, 128, 64).cached
        shape = AttentionShape(cached, 16, torch.bfloat16, False, False, 64, 64, decode=True)
        assert shape.group <= MAX_GROUP
        assert shape.group * shape.groups == query


@pytest.mark.parametrize("invariant", [False, True])
def test_a_model_of_latents_gives_the_references_logits(tmp_path: Path, invariant: bool) -> None:
    folder = write_llama(tmp_path, **DEEPSEEK)
    found = logits_of(program_of(folder, invariant=invariant)[0])
    for ours, theirs in zip(found, reference_logits(folder), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_page_of_latents_takes_what_its_layout_says(tmp_path: Path, dtype: CacheDType) -> None:
    folder = write_llama(tmp_path, **DEEPSEEK)
    model = load_model(open_checkpoint(folder), GpuBackend("bfloat16", "bfloat16", HOST))
    layout = replace(cache_layout(model, SIZE, dtype), latents_once=GpuBackend.latents_once)
    _, backend = program_of(folder, weights="bfloat16", cache=dtype, pages=9, page_size=SIZE)
    # The last page is nobody's.
    pages = backend.pages()
    assert pages.page_bytes == layout.bytes_per_page
    assert layout.bytes_per_page == cache_layout(model, SIZE, dtype).bytes_per_page // 2
    block = np.arange(pages.page_bytes, dtype=np.uint8) % 100
    pages.write(block, 3)
    pages.copy(3, 5)
    found = np.zeros_like(block)
    pages.read(5, found)
    assert (found == block).all()
