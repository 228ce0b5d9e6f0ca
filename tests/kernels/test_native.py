"""The native CPU kernels against plain arithmetic, `transformers`, and in other company."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels import backend as backend_module
from kernels.backend import CacheLayout, select_backend
from kernels.batch import Batch
from kernels.cpu import native_backend
from kernels.cpu.native_backend import NativeBackend, NativeProgram, unavailable_reason
from kernels.ops import Heads, Recorder, Tape
from tests.engine.models.test_parity import pair
from tests.engine.weights.test_gguf import write_gguf
from tests.tiny import write_llama

__all__ = ["pair"]
reason = unavailable_reason()
needs_native = pytest.mark.skipif(reason is not None, reason=f"native kernels: {reason}")


@dataclass(frozen=True, eq=False)
class Host:
    """A tensor of a checkpoint that exists only here."""

    values: torch.Tensor
    format: str = "F32"
    blocks: torch.Tensor | None = None
    name: str = "w"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dense(self) -> torch.Tensor:
        return self.values

    def packed(self) -> torch.Tensor:
        assert self.blocks is not None
        return self.blocks


def quantized(kind: Type, rows: int, columns: int, seed: int = 0) -> Host:
    """Random weights as ggml blocks, and their exact values."""
    raw = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
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
    weight: Host, x: torch.Tensor, bias: torch.Tensor | None = None, threads: int = 2
) -> torch.Tensor:
    """`x @ weight.T (+ bias)` through a program: the inputs are the rows of an embedding table."""
    backend = NativeBackend("auto", threads)
    backend.allocate_cache(CacheLayout(1, Heads(1, 1, 16), 16, "bfloat16", 16), 1)
    table = backend.load([Host(x)])
    placed = backend.load([weight], [Host(bias)] if bias is not None else [])
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


@needs_native
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (50, 96), (7, 576), (1, 32)])
def test_quantized_linear_is_exact_up_to_its_activations(
    kind: Type, rows: int, columns: int
) -> None:
    weight = quantized(kind, rows, columns)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 5, 12, 13, 40):
        x = torch.randn(count, columns, generator=generator).bfloat16().float()
        expected = groups_of(x) @ weight.values.T
        error = (run_linear(weight, x) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, count


@needs_native
def test_bfloat16_linear_with_bias_for_odd_shapes() -> None:
    generator = torch.Generator().manual_seed(2)
    for rows, columns in ((17, 48), (3, 2), (33, 130)):
        weight = torch.randn(rows, columns, generator=generator)
        x = torch.randn(9, columns, generator=generator).bfloat16().float()
        bias = torch.randn(rows, generator=generator)
        expected = x @ weight.bfloat16().float().T + bias
        assert torch.allclose(run_linear(Host(weight), x, bias), expected, atol=1e-3, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q5_1])
def test_other_quantized_types_become_int8_groups(kind: Type) -> None:
    weight = quantized(kind, 32, 64)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    expected = x @ weight.values.T
    error = (run_linear(weight, x) - expected).abs().max() / expected.abs().max()
    assert error < 0.015


@needs_native
@pytest.mark.parametrize("extreme", [0.0, 1e-36, 1e-30, 3e38, 65504.0])
def test_extreme_activations_stay_finite_and_right(extreme: float) -> None:
    weight = quantized(Type.Q4_1, 16, 64)
    x = torch.full((2, 64), extreme).bfloat16().float() * 1e-3
    x[1] = -x[1]
    expected = groups_of(x) @ weight.values.T
    y = run_linear(weight, x)
    assert torch.isfinite(y).all()
    assert torch.allclose(y, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-3)


@needs_native
@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0, Type.F32])
def test_every_row_count_and_thread_count_gives_the_same_bits(kind: Type) -> None:
    weight = (
        Host(torch.randn(70, 96, generator=torch.Generator().manual_seed(4)))
        if kind == Type.F32
        else quantized(kind, 70, 96)
    )
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    whole = run_linear(weight, x, threads=2)
    for count in range(1, 65):
        assert torch.equal(run_linear(weight, x[:count], threads=1 + count % 3), whole[:count])


def program_of(
    path: Path, *, threads: int, page_size: int = 16, pages: int = 40, weights: Any = "auto"
) -> tuple[NativeProgram, Tape]:
    backend = NativeBackend(weights, threads)
    model = load_model(open_checkpoint(path), backend)
    layout = CacheLayout(
        model.config.layers, model.config.heads, page_size, "bfloat16", model.config.max_context
    )
    backend.allocate_cache(layout, pages)
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


@needs_native
@pytest.mark.parametrize("size", [16, 64])
def test_every_family_is_close_to_transformers(
    pair: tuple[Path, torch.nn.Module], size: int
) -> None:
    folder, model = pair
    tokens = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    program, _ = program_of(folder, threads=2, page_size=size)
    logits = logits_in_chunks(program, tokens.tolist(), [33, 1, 1, 25], size)
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < 0.05, float(error)


@needs_native
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.F32])
def test_a_sequence_alone_in_company_and_in_chunks_gives_the_same_bits(
    tmp_path: Path, kind: Type
) -> None:
    """Over more than one attention block of 256 positions, with one to three threads."""
    path = tmp_path / "model.gguf"
    write_gguf(path, kind=kind)
    tokens = np.random.default_rng(1).integers(0, 260, 300).tolist()
    program, _ = program_of(path, threads=2)
    whole = logits_in_chunks(program, tokens, [300])
    for threads, chunks in (
        (1, [300]),
        (3, [299, 1]),
        (2, [1] * 40 + [260]),
        (1, [7] * 42 + [6]),
        (2, [16] * 18 + [12]),
        (2, [255, 1, 1, 43]),
    ):
        other, _ = program_of(path, threads=threads)
        assert torch.equal(logits_in_chunks(other, tokens, chunks), whole), (threads, chunks[:3])


@needs_native
def test_a_decode_among_others_gives_the_same_bits_at_every_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, kind=Type.Q4_1)
    generator = np.random.default_rng(2)
    program, _ = program_of(path, threads=2, pages=200)
    tables = generator.permutation(200)[: 64 * 3].reshape(64, 3)
    prompts = [generator.integers(0, 260, int(n)).tolist() for n in generator.integers(1, 30, 64)]
    last: dict[int, torch.Tensor] = {}
    for others in (0, 1, 3, 11, 15, 31, 63):
        for number in range(others + 1):  # everybody's prompt, each alone
            program.forward(chunks_batch([prompts[number]], [0], tables[number : number + 1], 16))
        company = list(range(others + 1))
        batch = chunks_batch(
            [[7 + n] for n in company], [len(prompts[n]) for n in company], tables[company], 16
        )
        program.forward(batch)
        for number in (0, others // 2):
            row = program.logits()[number].clone()
            assert torch.equal(last.setdefault(number, row), row), (others, number)


@needs_native
def test_unsuited_layouts_are_refused(tmp_path: Path) -> None:
    backend = NativeBackend("auto", 1)
    for layout, message in (
        (CacheLayout(1, Heads(1, 1, 16), 8, "bfloat16"), r"cache\.page_size is 8"),
        (CacheLayout(1, Heads(1, 1, 16), 16, "float32"), r"cache\.dtype is float32"),
        (CacheLayout(1, Heads(1, 1, 512), 16, "bfloat16"), "512 wide"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.allocate_cache(layout, 4)


@needs_native
def test_more_rows_than_buffers_is_an_error_not_a_crash(tmp_path: Path) -> None:
    program, _ = program_of(write_llama(tmp_path), threads=1)
    table = np.zeros((1, 40), np.int64)
    with pytest.raises(ValueError, match="more rows"):
        program.forward(chunks_batch([[1] * 513], [0], table, 16))


def choose(name: str, dtype: Any = "auto", cache: Any = "auto") -> str:
    return select_backend(name, dtype=dtype, cache_dtype=cache, threads=1)[0].name


@needs_native
def test_auto_takes_native_unless_float32_is_asked_for() -> None:
    assert choose("auto") == "native"
    assert choose("auto", "bfloat16") == "native"
    assert choose("auto", "float32") == "torch"
    assert choose("auto", cache="float32") == "torch"
    assert choose("torch") == "torch"
    with pytest.raises(ValueError, match="do not compute in float32"):
        choose("native", "float32")


def test_without_native_kernels_torch_serves_and_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_backend, "native_module", lambda: None)
    with caplog.at_level(logging.WARNING, backend_module.logger.name):
        assert choose("auto") == "torch"
    assert "not built" in caplog.text
    assert "several times slower" in caplog.text
    with pytest.raises(ValueError, match="cannot serve: they were not built"):
        choose("native")


def test_a_cpu_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        @staticmethod
        def supported() -> bool:
            return False

    monkeypatch.setattr(native_backend, "native_module", lambda: Old)
    assert unavailable_reason() == "this CPU lacks AVX512-VNNI and AVX512-BF16"


@pytest.mark.skipif(
    shutil.which("c++") is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="the kernels are built with a C++ compiler on x86-64 Linux",
)
def test_where_there_is_a_compiler_the_kernels_are_built() -> None:
    """A build that fails only leaves them out, so that the installation succeeds."""
    assert native_backend.native_module() is not None


def test_a_missing_extension_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(native_backend.importlib, "import_module", missing)
    assert native_backend.native_module() is None
