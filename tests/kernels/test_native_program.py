"""Whole programs of native kernels: against `transformers`, and bit for bit in other company."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from kernels.backend import CacheLayout
from kernels.cpu.native_backend import NativeBackend, native_module
from kernels.cpu.native_sampling import NativeChooser
from kernels.ops import Heads
from kernels.tape import Recorder
from tests.engine.models.test_parity import pair
from tests.engine.weights.test_gguf import write_gguf
from tests.kernels.native import (
    INSTRUCTION_SETS,
    chunks_batch,
    logits_in_chunks,
    needs_native,
    program_of,
    quantized,
)
from tests.kernels.test_sampling import options
from tests.tiny import write_llama

__all__ = ["pair"]
pytestmark = needs_native
NO_ROWS = np.zeros(0, np.int64)
every_cache = pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8", "int4"])


def tiny(folder: Path, kind: Type, cache: str) -> Path:
    """A model whose heads the cache takes: int4 has groups of 32."""
    if cache == "int4":
        return write_llama(folder, head_dim=64)
    write_gguf(folder / "model.gguf", kind=kind)
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("size", "cache", "bound"), [(16, "bfloat16", 0.05), (64, "int8", 0.07), (16, "float32", 0.05)]
)
def test_every_family_is_close_to_transformers(
    pair: tuple[Path, torch.nn.Module], size: int, cache: str, bound: float
) -> None:
    folder, model = pair
    tokens = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    experts = hasattr(model.config, "num_local_experts") or getattr(
        model.config, "enable_moe_block", False
    )
    # States of random weights make much of any rounding (these weights in bfloat16 move the logits
    # of `transformers` by 9%); there only the cache may round.
    weights = "float32" if hasattr(model.config, "linear_num_key_heads") else "auto"
    program, _ = program_of(folder, page_size=size, cache=cache, weights=weights)
    logits = logits_in_chunks(program, tokens.tolist(), [33, 1, 1, 25], size)
    errors = (logits - expected).abs().amax(1) / expected.abs().max()
    # Experts whose scores are nearly equal change places when activations are rounded.
    changed = 2 if experts else 0
    assert int((~(errors <= bound)).sum()) <= changed, errors.sort(descending=True).values[:4]
    assert bool((errors < 0.5).all())


def test_a_step_of_which_nothing_is_asked_still_fills_the_cache(
    pair: tuple[Path, torch.nn.Module],
) -> None:
    tokens = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    program, _ = program_of(pair[0])
    whole = logits_in_chunks(program, tokens, [40])
    table = np.arange(10, 13)[None]
    program.forward(replace(chunks_batch([tokens[:23]], [0], table, 16), sample_rows=NO_ROWS))
    assert len(program.logits()) == 0
    program.forward(chunks_batch([tokens[23:]], [23], table, 16))
    assert torch.equal(program.logits(), whole[23:])


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_float32_is_exact_on_every_instruction_set(
    pair: tuple[Path, torch.nn.Module], instructions: str
) -> None:
    folder, model = pair
    tokens = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    program, _ = program_of(folder, weights="float32", cache="float32", instructions=instructions)
    logits = logits_in_chunks(program, tokens.tolist(), [33, 1, 1, 25])
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, float(error)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        (Type.Q4_0, "bfloat16"),
        (Type.Q4_1, "int8"),
        (Type.Q8_0, "float32"),
        (Type.F32, "bfloat16"),
        (Type.F32, "int4"),
    ],
)
def test_a_sequence_alone_in_company_and_in_chunks_gives_the_same_bits(
    tmp_path: Path, kind: Type, cache: str, instructions: str
) -> None:
    """Over more than one attention block of 256 positions, with one to three threads."""
    path = tiny(tmp_path, kind, cache)
    tokens = np.random.default_rng(1).integers(0, 260, 300).tolist()
    settings: Any = {"cache": cache, "instructions": instructions}
    program, _ = program_of(path, threads=2, **settings)
    whole = logits_in_chunks(program, tokens, [300])
    for threads, chunks in (
        (1, [300]),
        (3, [299, 1]),
        (2, [1] * 40 + [260]),
        (1, [7] * 42 + [6]),
        (2, [16] * 18 + [12]),
        (2, [255, 1, 1, 43]),
    ):
        other, _ = program_of(path, threads=threads, **settings)
        assert torch.equal(logits_in_chunks(other, tokens, chunks), whole), (threads, chunks[:3])


@every_cache
def test_a_decode_among_others_gives_the_same_bits_at_every_batch_size(
    tmp_path: Path, cache: str
) -> None:
    path = tiny(tmp_path, Type.Q4_1, cache)
    generator = np.random.default_rng(2)
    program, _ = program_of(path, pages=200, cache=cache)
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


def test_unsuited_layouts_are_refused(tmp_path: Path) -> None:
    backend = NativeBackend("auto", 1)
    for layout, message in (
        (CacheLayout((Heads(1, 1, 16),), 8, "bfloat16"), r"cache\.page_size is 8"),
        (CacheLayout((Heads(1, 1, 18),), 16, "bfloat16"), "18 wide"),
        (CacheLayout((Heads(1, 1, 580),), 16, "bfloat16"), "580 wide"),
        (CacheLayout((Heads(1, 1, 48),), 16, "int4"), "int4 takes multiples of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.allocate_cache(layout, 4)


def test_more_rows_than_buffers_is_an_error_not_a_crash(tmp_path: Path) -> None:
    program, _ = program_of(write_llama(tmp_path), threads=1)
    table = np.zeros((1, 40), np.int64)
    with pytest.raises(ValueError, match="more rows"):
        program.forward(chunks_batch([[1] * 513], [0], table, 16))


@every_cache
def test_what_another_sequence_left_in_a_page_is_never_seen(tmp_path: Path, cache: str) -> None:
    """A page that held garbage, even infinities, gives the same bits as a fresh one."""
    path = tiny(tmp_path, Type.Q8_0, cache)
    tokens = np.random.default_rng(4).integers(0, 260, 37).tolist()
    clean, _ = program_of(path, cache=cache)
    expected = logits_in_chunks(clean, tokens, [5, 32])
    used, _ = program_of(path, cache=cache)
    for layer in used.memory:
        for tensor in (layer.keys, layer.values):
            tensor.fill_(127)
            if not cache.startswith("int"):
                tensor.view(torch.float32 if cache == "float32" else torch.bfloat16).fill_(
                    float("inf")
                )
        for scales in (layer.key_scales, layer.value_scales):
            if scales is not None:
                scales.view(torch.float16 if cache == "int4" else torch.float32).fill_(float("nan"))
    assert torch.equal(logits_in_chunks(used, tokens, [5, 32]), expected)


@pytest.mark.parametrize("rows", [2, 3, 5, 64, 70_000])
def test_threads_share_out_few_pieces_and_more_than_a_ticket_numbers(rows: int) -> None:
    """A ticket has 16 bits for a piece."""
    native = native_module()
    assert native is not None
    logits = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
    choose = NativeChooser(native.Device(INSTRUCTION_SETS[0], 4))
    for _ in range(50 if rows < 100 else 1):
        ids = choose(logits, np.arange(rows), options(rows, temperature=0.0))
        assert ids.tolist() == logits.argmax(-1).tolist()


def test_threads_that_cannot_be_had_are_an_error_not_a_crash() -> None:
    native = native_module()
    assert native is not None
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), limits[1]))  # not for 4,000 stacks
    try:
        with pytest.raises(RuntimeError):
            native.Device(INSTRUCTION_SETS[0], 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert native.Device(INSTRUCTION_SETS[0], 2) is not None


def test_a_tape_that_quantizes_a_linears_output_is_refused() -> None:
    backend = NativeBackend("auto", 1)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "bfloat16", 16), 1)
    table = backend.load([quantized(Type.Q8_0, 32, 32)])
    recorder = Recorder()
    twice = recorder.linear(recorder.linear(recorder.embed(table, 1.0), table), table)
    tape = recorder.finish(recorder.linear(recorder.select_rows(twice), table))
    with pytest.raises(ValueError, match="cannot quantize what linear writes"):
        backend.compile(tape, 4)
