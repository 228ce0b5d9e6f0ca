"""The op protocol: models are recorded once and replayed at any number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout, resolve_dtype, select_backend, supports_bfloat16
from kernels.batch import Batch
from kernels.cpu.torch_ops import TorchCpuOps
from kernels.ops import HeadNorms, Heads, Rope, Weight
from kernels.reference import LayerCache, ReferenceOps, TorchWeight
from kernels.tape import Handle, Recorder, Rows, Tape
from tests.tiny import write_llama

SIZE = 4
PAGES = 128


def random_batch(rng: np.random.Generator, counts: list[int], before: list[int]) -> Batch:
    """Chunks of `counts` tokens, each after `before` tokens, on scattered pages."""
    width = max(-(-(c + b) // SIZE) for c, b in zip(counts, before, strict=True))
    table = rng.permutation(PAGES)[: width * len(counts)].reshape(len(counts), width)
    positions = np.concatenate([np.arange(b, b + c) for c, b in zip(counts, before, strict=True)])
    rows = np.repeat(np.arange(len(counts)), counts)
    total = len(positions)
    return Batch(
        token_ids=rng.integers(0, 260, total),
        positions=positions,
        kv_slots=table[rows, positions // SIZE] * SIZE + positions % SIZE,
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        context_lengths=(np.array(counts) + before).astype(np.int32),
        table_rows=np.arange(len(counts), dtype=np.int32),
        page_table=table.astype(np.int32),
        sample_rows=np.flatnonzero(rng.random(total) < 0.5),
    )


@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_a_tape_recorded_once_equals_eager_at_every_row_count(
    tmp_path: Path, backend_name: str
) -> None:
    backend, _ = select_backend(backend_name, dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(write_llama(tmp_path)), backend)
    layout = CacheLayout((model.config.heads,) * 2, SIZE, "float32")
    backend.allocate_cache(layout, PAGES)
    recorder = Recorder()
    program = backend.compile(recorder.finish(model.forward(recorder)), 512)
    kind = {"reference": ReferenceOps, "torch": TorchCpuOps}[backend_name]
    shape = (PAGES * SIZE, 2, 8)
    eager = kind([LayerCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(2)], SIZE)
    rng = np.random.default_rng(0)
    for rows in range(1, 65):
        batch = random_batch(rng, [rows], [0])
        program.forward(batch)
        eager.begin(batch)
        assert torch.equal(program.logits(), model.forward(eager)), rows


def ops_pair(dtype: torch.dtype) -> tuple[ReferenceOps, ReferenceOps, Heads]:
    heads = Heads(query=6, kv=2, dim=8)
    generator = torch.Generator().manual_seed(0)
    shape = (PAGES * SIZE, heads.kv, heads.dim)

    def cache() -> LayerCache:
        keys = torch.randn(shape, generator=generator).to(dtype)
        return LayerCache(keys, torch.randn(shape, generator=generator).to(dtype))

    made = [cache()]
    copies = [LayerCache(c.keys.clone(), c.values.clone()) for c in made]
    return ReferenceOps(made, SIZE), TorchCpuOps(copies, SIZE), heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("sunk", [False, True])
def test_fused_attention_equals_the_reference_for_any_mixture(
    dtype: torch.dtype, window: int, *, sunk: bool
) -> None:
    rng = np.random.default_rng(1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for counts, before in (
        ([1], [0]),
        ([1, 1, 1], [0, 30, 7]),
        ([9], [0]),
        ([1, 7, 1, 3], [13, 4, 0, 22]),
    ):
        batch = random_batch(rng, counts, before)
        reference, fused, heads = ops_pair(dtype)
        qkv = torch.randn(sum(counts), heads.qkv_width, generator=torch.Generator().manual_seed(2))
        rope = Rope(tuple(1.0 / 10.0**i for i in range(heads.dim // 2)))
        scores = torch.linspace(-2, 2, heads.query)
        sinks = TorchWeight("sinks", (heads.query,), scores)
        outputs = []
        for ops in (reference, fused):
            ops.begin(batch)
            q = ops.rope_write_kv(qkv, 0, heads, rope, None)
            outputs.append(ops.attention(q, 0, heads, 0.3, window, sinks if sunk else None))
        assert torch.equal(reference.caches[0].keys, fused.caches[0].keys)
        assert torch.allclose(outputs[0], outputs[1], atol=tolerance)


def test_the_reference_attends_to_exactly_the_visible_positions() -> None:
    """One head, values that name their position: the output is their mean."""
    heads = Heads(1, 1, 2)
    cache = LayerCache(torch.zeros(8, 1, 2), torch.zeros(8, 1, 2))
    ops = ReferenceOps([cache], page_size=8)
    cache.values[:, 0, 0] = torch.arange(8.0)
    batch = Batch(
        token_ids=np.zeros(1, np.int64),
        positions=np.array([4]),
        kv_slots=np.array([4]),
        query_starts=np.array([0, 1], np.int32),
        context_lengths=np.array([5], np.int32),
        table_rows=np.zeros(1, np.int32),
        page_table=np.zeros((1, 1), np.int32),
        sample_rows=np.zeros(1, np.int64),
    )
    ops.begin(batch)
    q = torch.zeros(1, 2)
    assert ops.attention(q, 0, heads, 1.0, 0)[0, 0] == pytest.approx(2.0)  # mean of 0..4
    assert ops.attention(q, 0, heads, 1.0, 2)[0, 0] == pytest.approx(3.5)  # mean of 3, 4
    sink = TorchWeight("sink", (1,), torch.log(torch.tensor([5.0])))  # as much as five keys
    assert ops.attention(q, 0, heads, 1.0, 0, sink)[0, 0] == pytest.approx(1.0)


def test_tapes_drop_activations_after_their_last_use(tmp_path: Path) -> None:
    backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(write_llama(tmp_path)), backend)
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    assert isinstance(tape, Tape)
    dropped = [index for dead in tape.last_use for index in dead]
    produced = [h.index for i in tape.instructions for h in i.results]
    assert sorted([*dropped, tape.logits.index]) == sorted(produced)
    assert tape.logits.rows is Rows.SAMPLES


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, x, w: r.rms_norm(x, w, 1e-5), "does not fit width 8"),
        (lambda r, x, w: r.add_rms_norm(x, x, w, 1e-5), "differ in shape"),
        (lambda r, x, w: r.linear(x, w), "does not fit width 8"),
        (lambda r, x, w: r.rope_write_kv(x, 3, Heads(1, 1, 4), Rope(()), None), "layer 3: qkv"),
        (lambda r, x, w: r.head_squares(x, Heads(1, 1, 4), True), "qkv is 8 wide"),
        (lambda r, x, w: r.head_squares(x, Heads(0, 2, 2), False), "2 key heads that nobody"),
        (
            lambda r, x, w: r.rope_write_kv(
                x, 3, Heads(2, 1, 2), Rope(()), HeadNorms(w, w, 1e-5, whole=Heads(4, 2, 2))
            ),
            "layer 3: 0 squares of heads, not 8",
        ),
        (
            lambda r, x, w: r.rope_write_kv(x, 3, Heads(2, 1, 2), Rope(()), HeadNorms(w, w, 1e-5)),
            "layer 3: w does not fit its heads",
        ),
        (lambda r, x, w: r.attention(x, 3, Heads(1, 1, 4), 1.0, 0), "layer 3: q is 8"),
        (lambda r, x, w: r.gated(Handle(9, Rows.TOKENS, 7), "silu"), "7 wide"),
        (lambda r, x, w: r.select_rows(r.select_rows(x)), "once"),
    ],
)
def test_recording_finds_weights_that_do_not_fit(call: Any, message: str) -> None:
    recorder = Recorder()
    x = recorder.embed(Weight("table", (10, 8)), 1.0)
    with pytest.raises(ValueError, match=message):
        call(recorder, x, Weight("w", (5, 5)))


def test_unknown_backends_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="'tpu' is not known; choose one of auto, native, triton, torch"
    ):
        select_backend("tpu", dtype="float32", cache_dtype="auto", threads=1)


def test_auto_dtype_follows_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_dtype("float32") == "float32"
    for flags, expected in (("avx2", "float32"), ("avx2 avx512_bf16", "bfloat16")):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: flags)
        assert resolve_dtype("auto") == expected
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert not supports_bfloat16()
