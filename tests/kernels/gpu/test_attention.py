"""Paged attention on the GPU: any mixture, heads, window and cache, split or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.batch import Batch
from kernels.gpu.attention import AttentionShape
from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.workspace import Bucket, GpuCache, Workspace
from kernels.ops import HeadNorms, Heads, Rope
from kernels.reference import LayerCache, ReferenceOps, TorchWeight
from tests.kernels.gpu.filled import gpu_vector
from tests.kernels.test_ops import PAGES, SIZE, random_batch

HOST = torch.device("cpu")
MIXTURES = {
    "decode": ([1, 1, 1], [0, 30, 7]),
    "prefill": ([9], [0]),
    "mixed": ([1, 7, 1, 3], [13, 4, 0, 22]),
    "long": ([1], [150]),
}


def both(
    heads: Heads,
    batch: Batch,
    window: int,
    *,
    dtype: torch.dtype = torch.float32,
    quantized: bool = False,
    invariant: bool = False,
    norms: bool = False,
    sinks: torch.Tensor | None = None,
    windowed: bool = False,
    **changes: float,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Outputs of the reference and of the kernels after the same writes, and the written keys."""
    generator = torch.Generator().manual_seed(0)
    shape = (PAGES * SIZE, heads.kv, heads.dim)
    keys = torch.randn(shape, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    rows, sequences = len(batch.token_ids), len(batch.context_lengths)
    width, trash = batch.page_table.shape[1], PAGES * SIZE
    staging = Staging(rows + 3, sequences + 2, width, trash, HOST, trash if windowed else 0)
    staging.copy(in_window_pages(batch) if windowed else batch)
    if quantized:
        steps = [t.abs().amax(-1) / 127 for t in (keys, values)]
        numbers = [(t / s[..., None]).round() for t, s in zip((keys, values), steps, strict=True)]
        keys, values = (n * s[..., None] for n, s in zip(numbers, steps, strict=True))
        spare = torch.zeros(1, heads.kv)
        cache = GpuCache(
            *(torch.cat([n, torch.zeros(1, *shape[1:])]).to(torch.int8) for n in numbers),
            *(torch.cat([s, spare]) for s in steps),
            windowed=windowed,
        )
    else:
        spare = torch.zeros(1, *shape[1:], dtype=dtype)
        cache = GpuCache(torch.cat([keys, spare]), torch.cat([values, spare]), windowed=windowed)
    reference = ReferenceOps([LayerCache(keys.clone(), values.clone())], SIZE)
    reference.begin(batch)
    ops = GpuOps([cache], SIZE, staging, Workspace(HOST), dtype, 256, invariant)
    decode = rows == sequences
    ops.bucket = Bucket(rows + (2 if decode else 3), sequences + 2, 1, decode)
    qkv = torch.randn(ops.bucket.rows, heads.qkv_width, generator=generator).to(dtype)
    rope = Rope(tuple(1.0 / 10.0 ** (i / 8) for i in range(heads.dim // 2)))
    rope = replace(rope, **changes)
    weights = [1 + torch.randn(heads.dim, generator=generator) * 0.2 for _ in "qk"]
    theirs = [TorchWeight("n", (heads.dim,), w) for w in weights]
    ours = [gpu_vector(w) for w in weights]
    q = reference.rope_write_kv(
        qkv[:rows].float(), 0, heads, rope, HeadNorms(*theirs, 1e-5) if norms else None
    )
    theirs_sunk = None if sinks is None else TorchWeight("s", (heads.query,), sinks)
    wanted = reference.attention(q, 0, heads, 0.3, window, theirs_sunk)
    by_head = HeadNorms(*ours, 1e-5) if norms else None
    q = ops.rope_write_kv(qkv, 0, heads, rope, by_head)
    sunk = None if sinks is None else gpu_vector(sinks)
    found = ops.attention(q, 0, heads, 0.3, window, sunk)[:rows].float()
    slots = torch.from_numpy(batch.kv_slots)
    stored = cache.keys[slots].float()
    if cache.key_scales is not None:
        stored = stored * cache.key_scales[slots][..., None]
    return wanted, found, [reference.caches[0].keys[slots].float(), stored]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("query", "kv", "dim"), [(6, 2, 8), (3, 3, 16), (9, 3, 20), (2, 1, 264)])
def test_any_mixture_with_any_heads_equals_the_reference(
    mixture: str, query: int, kv: int, dim: int
) -> None:
    batch = random_batch(np.random.default_rng(1), *MIXTURES[mixture])
    wanted, found, (written, stored) = both(Heads(query, kv, dim), batch, 0)
    assert torch.allclose(stored, written, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_hides_what_lies_before_it(mixture: str, window: int) -> None:
    batch = random_batch(np.random.default_rng(2), *MIXTURES[mixture])
    wanted, found, _ = both(Heads(4, 2, 16), batch, window)
    assert torch.allclose(found, wanted, atol=1e-5)


def in_window_pages(batch: Batch) -> Batch:
    """The same for a layer with window pages; those of other layers lie elsewhere."""
    return replace(
        batch,
        window_slots=batch.kv_slots,
        window_table=batch.page_table,
        kv_slots=np.zeros_like(batch.kv_slots),
        page_table=np.zeros_like(batch.page_table),
    )


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("quantized", [False, True])
def test_layers_with_window_pages_read_and_write_those(mixture: str, *, quantized: bool) -> None:
    batch = random_batch(np.random.default_rng(2), *MIXTURES[mixture])
    heads = Heads(4, 2, 16)
    wanted, found, (written, stored) = both(heads, batch, 5, quantized=quantized, windowed=True)
    assert torch.allclose(stored, written, atol=0.1 if quantized else 1e-5)
    assert torch.allclose(found, wanted, atol=0.05 if quantized else 1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(("window", "invariant"), [(0, False), (5, False), (0, True)])
def test_sinks_take_their_share_once_however_contexts_are_split(
    mixture: str, window: int, *, invariant: bool
) -> None:
    batch = random_batch(np.random.default_rng(2), *MIXTURES[mixture])
    sinks = torch.tensor([-9.0, 0.0, 2.0, 60.0])
    wanted, found, _ = both(Heads(4, 2, 16), batch, window, sinks=sinks, invariant=invariant)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(wanted[:, :48].abs().max()) > 0.1 > 1e-6 > float(wanted[:, 48:].abs().max())


def test_queries_and_keys_are_normalized_by_head_before_they_are_rotated() -> None:
    batch = random_batch(np.random.default_rng(3), *MIXTURES["mixed"])
    wanted, found, (written, stored) = both(Heads(4, 2, 16), batch, 0, norms=True)
    assert torch.allclose(stored, written, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_queries_grow_with_their_position_and_rotation_has_a_magnitude() -> None:
    batch = random_batch(np.random.default_rng(3), *MIXTURES["mixed"])
    heads = Heads(4, 2, 16)
    wanted, found, (written, stored) = both(heads, batch, 0, growth=0.7, step=3, magnitude=1.2)
    assert torch.allclose(stored, written, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)
    _, plain, (_, smaller) = both(heads, batch, 0)
    assert float((found - plain).abs().max()) > 0.1
    assert torch.allclose(stored, smaller * 1.2, atol=1e-5)


@pytest.mark.parametrize("mixture", ["decode", "mixed"])
def test_bf16_and_int8_caches_lose_no_more_than_their_steps(mixture: str) -> None:
    batch = random_batch(np.random.default_rng(4), *MIXTURES[mixture])
    wanted, found, _ = both(Heads(4, 2, 16), batch, 0, dtype=torch.bfloat16)
    assert torch.allclose(found, wanted, atol=3e-2)
    wanted, found, (written, stored) = both(Heads(4, 2, 16), batch, 0, quantized=True)
    assert torch.allclose(stored, written, atol=float(written.abs().max()) / 127)
    assert torch.allclose(found, wanted, atol=5e-2)


def test_a_long_context_is_split_and_merged_to_the_same_result() -> None:
    shape = AttentionShape(Heads(4, 2, 16), SIZE, torch.float32, False, False, 3, 3, decode=True)
    assert shape.splits > 1, "the mixtures above would not reach the merging kernel"
    batch = random_batch(np.random.default_rng(5), [1, 5], [140, 60])
    wanted, found, _ = both(Heads(4, 2, 16), batch, 0, invariant=True)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_in_the_invariant_mode_a_row_has_the_same_bits_alone_and_in_company() -> None:
    rng = np.random.default_rng(6)
    batch = random_batch(rng, [1, 4], [70, 20])
    _, together, _ = both(Heads(4, 2, 16), batch, 0, invariant=True)
    alone = Batch(
        token_ids=batch.token_ids[:1],
        positions=batch.positions[:1],
        kv_slots=batch.kv_slots[:1],
        query_starts=np.array([0, 1], np.int32),
        context_lengths=batch.context_lengths[:1],
        table_rows=batch.table_rows[:1],
        page_table=batch.page_table,
        sample_rows=np.zeros(1, np.int64),
    )
    _, single, _ = both(Heads(4, 2, 16), alone, 0, invariant=True)
    # The same row of the same projection: the generator is seeded alike.
    assert torch.equal(single[0], together[0])


def test_the_grid_depends_on_the_largest_batch_alone() -> None:
    shape = AttentionShape(Heads(32, 8, 128), 16, torch.bfloat16, False, False, 64, 64, decode=True)
    assert (shape.block_m, shape.tokens, shape.blocks, shape.splits) == (16, 1, 64, 1)
    single = AttentionShape(Heads(32, 8, 128), 16, torch.bfloat16, False, False, 1, 1, decode=True)
    assert single.splits == 32
    mixed = AttentionShape(Heads(32, 8, 128), 16, torch.bfloat16, False, False, 512, 64, False)
    assert (mixed.block_m, mixed.tokens, mixed.blocks) == (64, 16, 96)
