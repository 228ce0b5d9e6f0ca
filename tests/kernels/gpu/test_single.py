"""Matmuls of one row with what stands around them, and tapes that are made for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout, select_backend
from kernels.gpu.backend import GpuBackend
from kernels.gpu.fuse import fuse, handles
from kernels.gpu.ops import GpuOps
from kernels.gpu.program import split
from kernels.gpu.staging import Staging
from kernels.gpu.weights import GpuWeight, place
from kernels.gpu.workspace import GpuCache, Workspace
from kernels.ops import HeadNorms, Heads, Rope
from kernels.tape import Handle, Recorder
from perf.gpu_tensors import dense_of
from tests.kernels.gpu.filled import HOST, gpu_vector, program_of
from tests.kernels.native import Host, chunks_batch, quantized
from tests.tiny import write_llama

FORMS = {
    "float32": lambda: place("w", [random(70, 300)], [], "float32", torch.float32, HOST),
    "int4": lambda: place("w", [random(70, 300)], [], "int4", torch.float32, HOST),
    "long int4": lambda: place("w", [random(70, 2200)], [], "int4", torch.float32, HOST),
    "Q4_1": lambda: place("w", [quantized(Type.Q4_1, 70, 160)], [], "auto", torch.float32, HOST),
}


def random(outputs: int, inputs: int) -> Host:
    return Host(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)))


def ops(caches: Sequence[GpuCache] = ()) -> GpuOps:
    staging = Staging(1, 1, 1, 5, HOST, window_trash=5)
    staging.positions[0], staging.kv_slots[0], staging.window_slots[0] = 11, 4, 2
    return GpuOps(list(caches), 4, staging, Workspace(HOST), torch.float32, 16, False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", ["nothing", "norm and residual", "norm and gate", "bias"])
def test_a_row_equals_the_ops_one_by_one(form: str, around: str) -> None:
    weight = FORMS[form]()
    values, inputs = dense_of(weight), weight.shape[1]
    x = random(1, inputs).values
    norm = 1 + 0.3 * random(1, inputs).values[0]
    residual = random(1, 70).values
    normed = x.double() * torch.rsqrt(x.double().square().mean() + 1e-5) * norm
    if around == "nothing":
        found, wanted = ops().row_linear(x, weight, None, 0.0, None, ""), x.double() @ values.T
    elif around == "bias":
        bias = torch.arange(70.0)
        biased = GpuWeight(**{**vars(weight), "bias": bias})
        found = ops().row_linear(x, biased, None, 0.0, None, "")
        wanted = x.double() @ values.T + bias
    elif around == "norm and gate":
        found = ops().row_linear(x, weight, gpu_vector(norm), 1e-5, None, "silu")
        gate, up = (normed @ values.T).split(35, 1)
        wanted = torch.nn.functional.silu(gate) * up
    else:
        found = ops().row_linear(x, weight, gpu_vector(norm), 1e-5, residual, "")
        wanted = normed @ values.T + residual
    # A row of digits keeps 14 bits of the largest of each 32.
    most = 1e-6 if weight.format == "float" else 2e-4
    assert float((found - wanted).abs().max() / wanted.abs().max()) < most


def test_rows_of_zeros_and_of_huge_numbers_have_digits_too() -> None:
    weight = FORMS["int4"]()
    for factor in (0.0, 1e30, 1e-20):
        x = random(1, 300).values * factor
        found = ops().row_linear(x, weight, None, 0.0, None, "")
        wanted = (x.double() @ dense_of(weight).T).float()
        assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-3 * factor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [Heads(5, 1, 10), Heads(3, 2, 10), Heads(7, 0, 10)])
@pytest.mark.parametrize("windowed", [False, True])
def test_rotated_heads_of_a_row_equal_two_ops(form: str, heads: Heads, windowed: bool) -> None:
    weight = FORMS[form]()
    weight = GpuWeight(**{**vars(weight), "bias": torch.arange(70.0) / 9})
    x, norm = random(1, weight.shape[1]).values, 1 + 0.3 * random(1, weight.shape[1]).values[0]
    frequencies = tuple(1.0 / 10.0 ** (i / 5) for i in range(5))
    rope = Rope(frequencies, magnitude=1.1, growth=0.5 if windowed else 0.0, step=3)
    found, caches = [], []
    for together in (False, True):
        empty = [torch.zeros(6, heads.kv, heads.dim) for _ in "kv"]
        both = ops([GpuCache(*empty, windowed=windowed)])
        before = (x, weight, gpu_vector(norm), 1e-5)
        if together:
            found.append(both.row_heads(*before, 0, heads, rope))
        else:
            qkv = both.row_linear(*before, None, "")
            found.append(both.rope_write_kv(qkv, 0, heads, rope, None))
        caches.append(empty)
    assert torch.allclose(found[0], found[1], atol=1e-5, rtol=1e-5)
    for apart, at_once in zip(*caches, strict=True):
        assert torch.allclose(apart, at_once, atol=1e-5, rtol=1e-5)
        written = [2 if windowed else 4] if heads.kv else []
        assert at_once.flatten(1).any(1).nonzero().flatten().tolist() == written


def recorded(path: Path) -> Any:
    backend = GpuBackend("bfloat16", "bfloat16", HOST)
    model = load_model(open_checkpoint(path), backend)
    recorder = Recorder()
    return recorder.finish(model.forward(recorder))


def test_norms_gates_sums_and_rotations_go_into_the_matmuls(tmp_path: Path) -> None:
    tape = recorded(write_llama(tmp_path))
    layers, head = split(tape)
    kept = {a.index for i, _ in head for a in i.arguments if isinstance(a, Handle)}
    steps, ends = (
        fuse(layers, kept, lambda _: True, lambda _: True),
        fuse(head, {tape.logits.index}, lambda _: True, lambda _: True),
    )
    ops_ = [[instruction.op for instruction, _ in part] for part in (steps, ends)]
    attention = ["row_heads", "attention"]
    rest = ["row_linear"] * 3
    # Behind the last attention only the rows go on that are asked for.
    assert ops_[0] == ["embed", *attention, *rest, *attention, "select_rows", "select_rows"]
    assert ops_[1] == [*rest, "row_linear"]
    assert all(i.arguments[2] is not None for i, _ in steps if i.op == "row_heads")
    found = [i.arguments for i, _ in (*steps, *ends) if i.op == "row_linear"]
    norms, sums = ([a[place] is not None for a in found] for place in (2, 4))
    assert norms == [False, True, False] * 2 + [True]
    assert sums == [True, False, True] * 2 + [False]
    assert [a[5] for a in found] == ["", "silu", ""] * 2 + [""]
    for part, needed in ((steps, kept), (ends, {tape.logits.index})):
        made = {h.index for i, _ in part for h in (*handles(i.arguments), *i.results)}
        freed = [index for _, dead in part for index in dead]
        assert sorted(freed) == sorted(made - needed)


def test_what_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    layers, head = split(recorded(write_llama(tmp_path)))
    kept = {a.index for i, _ in head for a in i.arguments if isinstance(a, Handle)}
    steps = fuse(layers, kept, lambda _: False, lambda _: True)
    assert [i for i, _ in steps] == [i for i, _ in layers]
    # A cache of numbers with scales in one layer alone.
    steps = fuse(layers, kept, lambda _: True, lambda layer: layer == 1)
    ops_ = [i.op for i, _ in steps]
    assert ops_.count("rope_write_kv") == ops_.count("row_heads") == 1


def test_heads_with_norms_are_rotated_by_themselves(tmp_path: Path) -> None:
    layers, _ = split(recorded(write_llama(tmp_path)))
    norm = gpu_vector(torch.ones(8))
    by_head = [
        (replace(i, arguments=(*i.arguments[:4], HeadNorms(norm, norm, 1e-5), None)), dead)
        if i.op == "rope_write_kv"
        else (i, dead)
        for i, dead in layers
    ]
    ops_ = [i.op for i, _ in fuse(by_head, set(), lambda _: True, lambda _: True)]
    assert ops_.count("rope_write_kv") == 2
    assert "row_heads" not in ops_


def test_single_tokens_give_the_references_logits(tmp_path: Path) -> None:
    path = write_llama(tmp_path)
    backend, _ = select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(path), backend)
    backend.allocate_cache(CacheLayout((model.config.heads,) * 2, 4, "float32"), 128)
    recorder = Recorder()
    reference = backend.compile(recorder.finish(model.forward(recorder)), 512)
    program, _ = program_of(path)
    rng = np.random.default_rng(0)
    tables = rng.permutation(120).reshape(4, 30).astype(np.int32)
    for counts, starts in (([9, 4], [0, 0]), ([1, 1], [9, 4]), ([1], [10]), ([1], [11])):
        tokens = [rng.integers(0, 260, count).tolist() for count in counts]
        batch = chunks_batch(tokens, starts, tables, 4)
        program.forward(batch)
        reference.forward(batch)
        assert torch.allclose(program.logits(), reference.logits(), atol=1e-4)
