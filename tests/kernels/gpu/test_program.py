"""Whole models on the GPU backend, padding and page moves included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout, select_backend
from kernels.gpu.backend import GpuBackend
from kernels.gpu.ops import GpuOps
from kernels.gpu.program import GpuProgram, buckets, bytes_beside
from kernels.gpu.staging import Staging
from kernels.gpu.workspace import Workspace
from kernels.ops import Activation, Heads
from kernels.reference import ReferenceOps
from kernels.tape import Recorder
from tests.engine.weights.test_stacked import in_mxfp4
from tests.kernels.gpu.filled import HOST, program_of
from tests.kernels.native import Host, batch_of, chunks_batch, quantized
from tests.kernels.test_sampling import options
from tests.tiny import EXPERTS, OLMO, write_llama

SIZE = 4
# More tokens than a row bucket, chunks of every kind, and one that decodes.
STEPS: list[tuple[list[int], list[int]]] = [
    ([9, 1, 5], [0, 0, 0]),
    ([1, 1, 1], [9, 1, 5]),
    ([3, 8], [10, 2]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def logits_of(program: Any) -> list[torch.Tensor]:
    """Logits of every row of STEPS."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(120).reshape(4, 30).astype(np.int32)
    found = []
    for counts, starts in STEPS:
        tokens = [rng.integers(0, 260, count).tolist() for count in counts]
        program.forward(chunks_batch(tokens, starts, tables, SIZE))
        found.append(program.logits().clone())
    return found


@pytest.fixture(scope="module")
def computed(folder: Path) -> tuple[GpuProgram, GpuBackend, list[torch.Tensor]]:
    """A program in fp32 after STEPS, and their logits."""
    with np.errstate(all="ignore"):
        program, backend = program_of(folder)
        return program, backend, logits_of(program)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[torch.Tensor]:
    return reference_logits(folder)


def reference_logits(folder: Path) -> list[torch.Tensor]:
    """The reference's logits of every row of STEPS."""
    backend, _ = select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(folder), backend)
    backend.allocate_cache(cache_layout(model, SIZE, "float32"), 128, states=8)
    recorder = Recorder()
    return logits_of(backend.compile(recorder.finish(model.forward(recorder)), 512))


def test_a_model_gives_the_references_logits_at_every_mixture(
    computed: tuple[GpuProgram, GpuBackend, list[torch.Tensor]], wanted: list[torch.Tensor]
) -> None:
    for ours, theirs in zip(computed[2], wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_two_sets_of_weights_share_the_cache_and_what_was_drawn(folder: Path) -> None:
    """A prompt's end is drawn with one set, and goes on with the other."""
    first, backend = program_of(folder, weights="bfloat16", cache="bfloat16")
    others = backend.other_weights("int8")
    model = load_model(open_checkpoint(folder), others)
    assert others.loaded_bytes() < backend.loaded_bytes()
    recorder = Recorder()
    second = backend.compile(recorder.finish(model.forward(recorder)), 32, 4)
    tables = np.arange(30, dtype=np.int32)[None]
    prompt = replace(chunks_batch([[7, 8, 9]], [0], tables, SIZE), sample_rows=np.array([2]))
    greedy = options(1, temperature=0)
    (drawn,) = first.start(prompt, lambda: greedy, 0, [0], [0])().ids
    found = []
    for token, fed in ((0, 1), (drawn, 0)):
        second.start(chunks_batch([[token]], [3], tables, SIZE), lambda: greedy, fed, [], [])()
        found.append(second.logits().clone())
    assert (found[0] == found[1]).all()
    first.forward(chunks_batch([[drawn]], [3], tables, SIZE))
    exact = first.logits()
    assert 0 < float((found[0] - exact).abs().max() / exact.abs().max()) < 0.1


@pytest.mark.parametrize("invariant", [False, True])
def test_a_model_of_experts_gives_the_references_logits(tmp_path: Path, invariant: bool) -> None:
    folder = write_llama(tmp_path, **EXPERTS)
    found = logits_of(program_of(folder, invariant=invariant)[0])
    for ours, theirs in zip(found, reference_logits(folder), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("invariant", [False, True])
def test_norms_over_all_heads_give_the_references_logits(tmp_path: Path, invariant: bool) -> None:
    folder = write_llama(tmp_path, **OLMO)
    found = logits_of(program_of(folder, invariant=invariant)[0])
    for ours, theirs in zip(found, reference_logits(folder), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bits", [8, 16])
def test_scores_of_a_router_stay_in_fp32(bits: int, rows: int) -> None:
    backend = GpuBackend("bfloat16", "bfloat16", HOST)
    router = backend.load([Host(torch.randn(8, 64))], bits=bits)
    staging = Staging(rows, rows, 1, 0, HOST)
    ops = GpuOps([], SIZE, staging, Workspace(HOST), torch.bfloat16, 16, invariant=False)
    x = torch.randn(rows, 64).bfloat16()
    scores = ops.linear(x, router)
    assert scores.dtype == (torch.float32 if bits == 16 else torch.bfloat16)
    if rows == 1 and ops.fits_row(router):
        row = ops.row_linear(x, router, None, 0.0, None, "")
        assert row.dtype == scores.dtype
        assert torch.allclose(row, scores, atol=1e-2)


def test_gpt_oss_gives_the_references_logits_from_numbers_of_four_bits(tmp_path: Path) -> None:
    quantized, as_floats = in_mxfp4(tmp_path, num_hidden_layers=2, vocab_size=260)
    program, _ = program_of(quantized, weights="auto", page_size=SIZE)
    for ours, theirs in zip(logits_of(program), reference_logits(as_floats), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_bf16_rounds_and_does_nothing_else(folder: Path, wanted: list[torch.Tensor]) -> None:
    narrow = logits_of(program_of(folder, weights="bfloat16", cache="bfloat16")[0])
    for ours, theirs in zip(narrow, wanted, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 0.05


def test_sampling_returns_ids_logprobs_and_the_best(
    computed: tuple[GpuProgram, GpuBackend, list[torch.Tensor]],
) -> None:
    program, _, found = computed
    logits = found[-1]
    samples = program.sample(options(len(logits), temperature=0, top_logprobs=2))
    assert samples.ids == logits.argmax(-1).tolist()
    best = torch.log_softmax(logits, -1).max(-1).values
    assert samples.logprobs == pytest.approx(best.tolist(), abs=1e-5)
    assert [top[0][0] for top in samples.top] == samples.ids
    assert all(len(top) == 2 for top in samples.top)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2", "swiglu_oai"])
def test_gates_equal_the_reference(activation: Activation) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 4
    staging = Staging(3, 3, 1, 0, HOST)
    ops = GpuOps([], SIZE, staging, Workspace(HOST), torch.float32, 16, invariant=False)
    wanted = ReferenceOps([], SIZE).gated(x, activation)
    assert torch.allclose(ops.gated(x, activation), wanted, atol=1e-5)


def test_pages_are_copied_and_go_to_the_host_and_back() -> None:
    backend = GpuBackend("bfloat16", "bfloat16", HOST)
    backend.allocate_cache(CacheLayout((Heads(4, 2, 8),) * 2, SIZE, "int8", 64), 8)
    pages = backend.pages()
    assert pages.page_bytes == 2 * 2 * SIZE * 2 * (8 + 4)
    block = np.random.default_rng(0).integers(0, 255, pages.page_bytes, np.uint8)
    found = np.zeros_like(block)
    pages.write(block, 3)
    pages.copy(3, 6)
    pages.read(6, found)
    assert (found == block).all()
    pages.read(5, found)
    assert not found.any()
    pages.discard([6])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_go_to_the_host_as_int8_and_come_back_rounded(dtype: Any) -> None:
    backend = GpuBackend(dtype, dtype, HOST)
    backend.allocate_cache(CacheLayout((Heads(4, 2, 24),) * 2, SIZE, dtype, 64), 8)
    pages, codec = backend.pages(), backend.page_codec("int8")
    vectors = 2 * 2 * SIZE * 2
    assert codec.page_bytes == vectors * (24 + 4)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    values = torch.randn(vectors, 24, generator=torch.Generator().manual_seed(0))
    values[5] = 0
    values = values.to(kind)
    pages.write(values.view(torch.uint8).numpy().reshape(-1), 3)
    block = np.zeros(codec.page_bytes, np.uint8)
    codec.compress(3, block)
    codec.restore(block, 6)
    back = np.zeros(pages.page_bytes, np.uint8)
    pages.read(6, back)
    found = torch.from_numpy(back).view(kind).view(vectors, 24).float()
    step = values.float().abs().amax(1, keepdim=True) / 127
    least = 0.501 if dtype == "float32" else 1.1  # and what bfloat16 rounds
    assert ((found - values.float()).abs() <= step * least).all()
    pages.read(5, back)
    assert not back.any()


def test_a_codec_makes_int8_of_floats() -> None:
    backend = GpuBackend("bfloat16", "bfloat16", HOST)
    backend.allocate_cache(CacheLayout((Heads(4, 2, 8),), SIZE, "int8", 64), 8)
    with pytest.raises(ValueError, match="int8 of a float cache"):
        backend.page_codec("int8")


def test_rows_of_an_int8_table_are_looked_up() -> None:
    table = Host(torch.randn(40, 160, generator=torch.Generator().manual_seed(0)))
    backend = GpuBackend("int8", "float32", HOST)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "float32", 16), 8)
    placed = backend.load([table])
    unit = GpuBackend("float32", "float32", HOST).load([Host(torch.eye(160))])
    recorder = Recorder()
    hidden = recorder.select_rows(recorder.embed(placed, 1.0))
    program = backend.compile(recorder.finish(recorder.linear(hidden, unit)), 8, 8)
    program.forward(batch_of([39, 0], [0, 1]))
    wanted = table.values[[39, 0]]
    steps = wanted.abs().amax(1, keepdim=True) / 127
    assert ((program.logits() - wanted).abs() <= steps * 0.51).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4"])
def test_rows_of_quantized_tables_are_looked_up(kind: str) -> None:
    table = quantized(Type[kind], 40, 160)
    backend = GpuBackend("auto", "float32", HOST)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "float32", 16), 8)
    placed, unit = backend.load([table]), backend.load([Host(torch.eye(160))])
    recorder = Recorder()
    hidden = recorder.select_rows(recorder.embed(placed, 2.0))
    program = backend.compile(recorder.finish(recorder.linear(hidden, unit)), 8, 8)
    program.forward(batch_of([39, 0, 7], [0, 1, 2]))
    assert torch.allclose(program.logits(), table.values[[39, 0, 7]] * 2, atol=1e-5)


def test_sizes_are_rounded_up_to_few() -> None:
    assert buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert buckets(100, 16) == [16, 24, 32, 48, 64, 96, 100]
    assert len(buckets(2048, 16)) == 15


def test_what_cannot_be_held_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="int4 takes the native kernels"):
        program_of(folder, cache="int4")
    with pytest.raises(ValueError, match="takes float32 or int8"):
        program_of(folder, cache="bfloat16")
    layout = CacheLayout((Heads(1, 1, 20),), 16, "float32", 16)
    with pytest.raises(ValueError, match="20 wide"):
        GpuBackend("auto", "float32", HOST).allocate_cache(layout, 8)
    with pytest.raises(ValueError, match="cannot serve"):
        select_backend("triton", dtype="auto", cache_dtype="auto", threads=1)
    with pytest.raises(ValueError, match="does not compute in int4"):
        select_backend("torch", dtype="int4", cache_dtype="auto", threads=1)


def test_room_for_experts_is_counted(tmp_path: Path) -> None:
    """Rows are laid out by expert, and each block is full but one for each expert."""
    program = program_of(write_llama(tmp_path, **EXPERTS))[0]
    # 32 rows of 2 experts in 4 + 4 blocks of 16; hidden 32, gates and what they leave 48 each.
    room = 8 * 16 * (32 + 3 * 48) * 2
    assert {bytes_beside(i, 32) for i in program._tape.instructions} == {0, room}
    assert program.buffer_bytes(4) > room
