"""Native matmuls against plain arithmetic, on every instruction set that this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from kernels.backend import CacheLayout
from kernels.cpu.native_backend import NativeBackend
from kernels.ops import Heads
from kernels.tape import Recorder
from tests.kernels.native import (
    INSTRUCTION_SETS,
    Host,
    batch_of,
    groups_of,
    needs_native,
    quantized,
    run_linear,
)

pytestmark = needs_native
every_set = pytest.mark.parametrize("instructions", INSTRUCTION_SETS)


def ternary(rows: int, columns: int, scale: float = 0.5) -> Host:
    """Random signs under one scale."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    signs = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    return Host(signs * scale, "TERNARY", signs, scale=scale)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Activations as int8 rows hold them, in float64."""
    factor = torch.full((len(x), 1), 127.0) / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * factor).round().double() * (1.0 / factor).double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@every_set
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.MXFP4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (50, 96), (7, 576), (1, 32), (3, 224)])
def test_quantized_linear_is_exact_up_to_its_activations(
    kind: Type, rows: int, columns: int, instructions: str
) -> None:
    weight = quantized(kind, rows, columns)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 5, 12, 13, 40):
        x = torch.randn(count, columns, generator=generator)
        found = run_linear(weight, x, instructions=instructions)
        assert relative_error(found, groups_of(x) @ weight.values.T) < 1e-5, count


@every_set
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.MXFP4])
def test_a_table_gives_back_the_values_that_it_holds(kind: Type, instructions: str) -> None:
    weight = quantized(kind, 20, 96)
    backend = NativeBackend("auto", 1, instructions)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "bfloat16", 16), 1)
    whole = NativeBackend("float32", 1, instructions).load([Host(torch.eye(96))])
    recorder = Recorder()
    rows = recorder.select_rows(recorder.embed(backend.load([weight]), 1.0))
    program = backend.compile(recorder.finish(recorder.linear(rows, whole)), 20)
    program.forward(batch_of(range(20), range(20)))
    assert torch.allclose(program.logits(), weight.values, rtol=1e-6, atol=1e-7)


def stored(weight: Host, weights: str) -> torch.Tensor:
    """What a matrix has become: its products with unit vectors, which int8 groups hold exactly."""
    unit = torch.eye(weight.shape[1]) * 127
    return (run_linear(weight, unit, weights=weights) / 127).T


def test_int4_fits_floats_better_than_their_extremes_do() -> None:
    """ggml's Q4_1 puts a group's least and largest values at its ends."""
    raw = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    found = stored(Host(raw), "int4")
    plain = quantized(Type.Q4_1, 64, 256, values=raw).values
    error, usual = ((w - raw).square().mean() for w in (found, plain))
    assert float(error / usual) < 0.93
    # Nor is any value far off.
    assert float((found - raw).abs().max()) < 0.45


def test_int4_keeps_what_four_bits_hold() -> None:
    held = quantized(Type.Q4_1, 32, 128).values
    assert torch.allclose(stored(Host(held), "int4"), held, atol=2e-3)
    constant = torch.full((16, 64), 0.3)
    assert torch.allclose(stored(Host(constant), "int4"), constant, rtol=1e-3)
    assert not stored(Host(torch.zeros(16, 64)), "int4").any()


def test_int4_leaves_blocks_of_four_bits_alone_and_rounds_others() -> None:
    for kind in (Type.Q4_0, Type.Q4_1):
        weight = quantized(kind, 32, 64)
        assert torch.equal(stored(weight, "int4"), stored(weight, "auto"))
    eight = quantized(Type.Q8_0, 32, 64)
    assert 0.0 < float((stored(eight, "int4") - eight.values).abs().max()) < 0.4


@every_set
def test_matrices_of_four_bits_with_and_without_a_minimum_become_one(instructions: str) -> None:
    parts = [quantized(kind, 32, 96) for kind in (Type.Q4_0, Type.Q4_1)]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    backend = NativeBackend("auto", 1, instructions)
    weight = backend.load(parts)
    assert weight.packed.bytes * 8 == 64 * 96 * 5.0  # type: ignore[attr-defined]
    expected = groups_of(x) @ torch.cat([part.values for part in parts]).T
    assert relative_error(run_linear(parts, x, instructions=instructions), expected) < 1e-5


def test_four_bits_without_a_minimum_take_no_room_for_one() -> None:
    packed = NativeBackend("auto", 1).load([quantized(Type.Q4_0, 32, 64)]).packed  # type: ignore[attr-defined]
    assert packed.bytes * 8 == 32 * 64 * 4.5


@pytest.mark.parametrize(("bits", "stored_bits"), [(4, 5.0), (8, 8.5), (16, 16.0)])
def test_a_weight_that_wants_more_bits_gets_them(bits: int, stored_bits: float) -> None:
    backend = NativeBackend("int4", 1)
    raw = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
    size = backend.load([Host(raw)], bits=bits).packed.bytes  # type: ignore[attr-defined]
    assert size * 8 / raw.numel() == stored_bits


def q4_k(rows: int, columns: int) -> Host:
    """Random q4_k blocks, which `gguf` reads but does not write."""
    import gguf
    import numpy as np

    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    factors = random.uniform(0.001, 0.1, (rows, columns // 256, 2)).astype(np.float16)
    blocks[:, :, :4] = factors.view(np.uint8)
    flat = blocks.reshape(rows, -1)
    return Host(torch.from_numpy(gguf.dequantize(flat, Type.Q4_K)), "Q4_K", torch.from_numpy(flat))


@every_set
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (35, 768)])
def test_q4_k_keeps_its_scales_and_minima_exactly(
    rows: int, columns: int, instructions: str
) -> None:
    weight = q4_k(rows, columns)
    x = torch.randn(9, columns, generator=torch.Generator().manual_seed(6))
    found = run_linear(weight, x, instructions=instructions)
    assert relative_error(found, groups_of(x) @ weight.values.T) < 1e-5


@every_set
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (1, 1), (33, 100), (48, 576), (7, 47)])
def test_ternary_linear_is_exact_for_odd_shapes(rows: int, columns: int, instructions: str) -> None:
    weight = ternary(rows, columns)
    generator = torch.Generator().manual_seed(7)
    for count in (1, 2, 3, 7, 20):
        x = torch.randn(count, columns, generator=generator)
        expected = rows_of(x) @ weight.values.double().T
        found = run_linear(weight, x, instructions=instructions)
        assert relative_error(found, expected) < 1e-6, count


@every_set
@pytest.mark.parametrize("extreme", [0.0, 1e-38, 1e-30, 1e-5, 65504.0, 3e38])
def test_ternary_survives_extreme_activations(extreme: float, instructions: str) -> None:
    """All signs equal and all activations at the limit: the largest sums that there can be."""
    signs = torch.ones(17, 8192, dtype=torch.int8)
    signs[1] = -1
    weight = Host(signs.float() * 1e-6, "TERNARY", signs, scale=1e-6)
    x = torch.full((3, 8192), extreme)
    x[1] = -x[1]
    x[2, ::2] = 0.0
    found = run_linear(weight, x, instructions=instructions)
    assert torch.isfinite(found).all()
    expected = rows_of(x) @ weight.values.double().T
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-12)


def test_stacked_ternary_parts_keep_their_scales() -> None:
    parts = [ternary(24, 64, 0.25), ternary(9, 64, 3.0)]
    backend = NativeBackend("auto", 1)
    packed: Any = backend.load(parts)
    assert packed.shape == (33, 64)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(8))
    whole = Host(torch.cat([p.values for p in parts]), "F32")
    found = torch.cat([run_linear(part, x) for part in parts], dim=1)
    assert relative_error(found, rows_of(x) @ whole.values.double().T) < 1e-6


@every_set
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), [(17, 48), (3, 2), (33, 130), (20, 7)])
def test_float_linear_with_bias_for_odd_shapes(
    rows: int, columns: int, weights: str, instructions: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(rows, columns, generator=generator)
    bias = torch.randn(rows, generator=generator)
    x = torch.randn(9, columns, generator=generator)
    narrow = weights == "bfloat16" and columns % 2 == 0
    stored = weight.bfloat16().float() if narrow else weight
    # Activations are rounded where pairs of bfloat16 are multiplied.
    seen = x.bfloat16().float() if narrow and instructions == "avx512bf16" else x
    found = run_linear(Host(weight), x, bias, instructions=instructions, weights=weights)
    assert torch.allclose(found, seen @ stored.T + bias, atol=1e-4, rtol=1e-4)


@every_set
@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q5_1])
def test_other_quantized_types_become_int8_groups(kind: Type, instructions: str) -> None:
    weight = quantized(kind, 32, 64)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    found = run_linear(weight, x, instructions=instructions)
    assert relative_error(found, x @ weight.values.T) < 0.015


def test_int8_can_be_asked_for() -> None:
    weight = Host(torch.randn(32, 64, generator=torch.Generator().manual_seed(9)))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    found = run_linear(weight, x, weights="int8")
    assert 1e-5 < relative_error(found, x @ weight.values.T) < 0.015


@every_set
@pytest.mark.parametrize("extreme", [0.0, 1e-36, 1e-30, 3e38, 65504.0])
def test_extreme_activations_stay_finite_and_right(extreme: float, instructions: str) -> None:
    for kind in (Type.Q4_1, Type.Q8_0, Type.MXFP4):
        weight = quantized(kind, 16, 64)
        x = torch.full((2, 64), extreme) * 1e-3
        x[1] = -x[1]
        expected = groups_of(x) @ weight.values.T
        y = run_linear(weight, x, instructions=instructions)
        assert torch.isfinite(y).all()
        assert torch.allclose(y, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-3)


@every_set
def test_the_largest_four_bit_sums_fit(instructions: str) -> None:
    """Every weight 15 above its minimum and every activation at its group's limit."""
    rows, columns = 17, 96
    blocks = torch.full((rows, columns // 32 * 18), 0xFF, dtype=torch.uint8)
    blocks.view(rows, -1, 18)[:, :, :2] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # fp16 1.0
    weight = Host(torch.full((rows, columns), 7.0), "Q4_0", blocks)
    for count in range(1, 10):
        x = torch.full((count, columns), -3.0)
        x[::2] = 3.0
        y = run_linear(weight, x, instructions=instructions)
        assert torch.allclose(y, groups_of(x).float() @ weight.values.T, rtol=1e-6), count


@every_set
@pytest.mark.parametrize("number", [7, 15])
def test_the_largest_sums_of_four_bit_floats_fit(number: int, instructions: str) -> None:
    """Every weight 6 or -6 times its scale, the smallest ones zero."""
    rows, columns = 17, 96
    blocks = torch.full((rows, columns // 32 * 17), number | number << 4, dtype=torch.uint8)
    scales = torch.arange(rows) * 16
    blocks.view(rows, -1, 17)[:, :, 0] = scales[:, None].to(torch.uint8)
    values = torch.ldexp(torch.tensor(6.0 if number == 7 else -6.0), (scales - 127).float())
    values = torch.where(scales > 0, values, 0.0)[:, None].expand(-1, columns)
    weight = Host(values, "MXFP4", blocks)
    for count in range(1, 10):
        x = torch.full((count, columns), -3.0)
        x[::2] = 3.0
        y = run_linear(weight, x, instructions=instructions)
        expected = groups_of(x).double() @ values.double().T
        kept = expected.abs() < 3e38
        assert torch.allclose(y.double()[kept], expected[kept], rtol=1e-6), count


FORMATS = {
    "float4": (quantized(Type.MXFP4, 70, 224), "auto"),
    "q4": (quantized(Type.Q4_1, 70, 96), "auto"),
    "q8": (quantized(Type.Q8_0, 70, 96), "auto"),
    "q4_k": (q4_k(70, 256), "auto"),
    "ternary": (ternary(70, 96), "auto"),
    "bf16": (Host(torch.randn(70, 96, generator=torch.Generator().manual_seed(4))), "bfloat16"),
    "f32": (Host(torch.randn(70, 96, generator=torch.Generator().manual_seed(4))), "float32"),
}


@every_set
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_count_and_thread_count_gives_the_same_bits(name: str, instructions: str) -> None:
    weight, weights = FORMATS[name]
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(5))
    options: Any = {"instructions": instructions, "weights": weights}
    whole = run_linear(weight, x, threads=2, **options)
    for count in range(1, 65):
        some = run_linear(weight, x[:count], threads=1 + count % 3, **options)
        assert torch.equal(some, whole[:count])


@pytest.mark.parametrize("name", ["q4", "q8", "q4_k", "float4", "ternary", "f32"])
def test_instruction_sets_agree_to_the_bit_where_products_are_exact(name: str) -> None:
    weight, weights = FORMATS[name]
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(5))
    first, *others = [
        run_linear(weight, x, instructions=i, weights=weights) for i in INSTRUCTION_SETS
    ]
    for other in others:
        assert torch.equal(other, first)
