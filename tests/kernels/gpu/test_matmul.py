"""Matmuls of every weight format, for few rows and many."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from kernels.gpu import ops as gpu_ops
from kernels.gpu.matmul import MatmulShape
from kernels.gpu.weights import pack_nibbles, place, quantize_groups, unpack_nibbles
from perf.gpu_tensors import dense_of
from tests.kernels.gpu.filled import HOST, run_linear
from tests.kernels.native import Host, quantized
from tests.kernels.test_native_linear import q4_k


def inputs(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda k: k.name)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_ggml_blocks_are_multiplied_in_their_own_bits(kind: Type, rows: int) -> None:
    weight, x = quantized(kind, 70, 160), inputs(rows, 160)
    assert torch.allclose(run_linear(weight, x), x @ weight.values.T, atol=1e-4)


@pytest.mark.parametrize("weights", ["Q4_1", "Q8_0", "int4"])
def test_for_many_rows_weights_in_groups_become_floats_some_at_a_time(
    monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr(gpu_ops, "SCRATCH_ELEMENTS", 160 * 128)
    rows, bias = gpu_ops.OWN_ROWS["group4"] + 1, torch.arange(300.0)
    weight = Host(inputs(300, 160)) if weights == "int4" else quantized(Type[weights], 300, 160)
    kind, x = "int4" if weights == "int4" else "auto", inputs(rows, 160)
    found = run_linear(weight, x, bias, weights=kind)
    few = run_linear(weight, x[:20], bias, weights=kind)
    assert torch.allclose(found[:20], few, atol=1e-3)


def test_q4_k_keeps_its_numbers_and_rounds_its_scales_to_fp16() -> None:
    weight, x = q4_k(40, 512), inputs(3, 512)
    wanted = x @ weight.values.T
    # A scale is the product of two numbers, of which fp16 holds 11 bits.
    assert torch.allclose(run_linear(weight, x), wanted, atol=float(wanted.abs().max()) * 2e-3)


@pytest.mark.parametrize("rows", [2, 20])
def test_int4_packs_a_float_matrix_in_groups_of_128(rows: int) -> None:
    weight, x = Host(inputs(70, 200)), inputs(rows, 200)
    groups = quantize_groups(weight.values, 128)
    spread = [t.repeat_interleave(128, 1)[:, :200] for t in (groups.scales, groups.lows)]
    rounded = groups.numbers * spread[0] + spread[1]
    assert (rounded - weight.values).abs().max() < spread[0].max() * 0.55
    assert torch.allclose(run_linear(weight, x, weights="int4"), x @ rounded.T, atol=1e-3)


def in_groups_of_128(rows: int, columns: int) -> tuple[Host, torch.Tensor, torch.Tensor]:
    """What GPTQ and AWQ leave, as blocks of 32, with its exact values; its scales and lows."""
    chosen = torch.Generator().manual_seed(7)
    numbers = torch.randint(0, 16, (rows, columns), generator=chosen)
    size = (rows, columns // 128)
    scales = (torch.rand(size, generator=chosen) * 0.1 + 0.01).half()
    zeros = torch.randint(0, 17, size, generator=chosen)
    wide = [t.repeat_interleave(128, 1) for t in (zeros, scales.float())]
    lows = (-zeros * scales.float()).half()
    factors = torch.stack([scales, lows], -1).repeat_interleave(4, 1)
    halves = numbers.view(rows, -1, 2, 16)
    bytes_ = (halves[:, :, 0] | halves[:, :, 1] << 4).to(torch.uint8)
    blocks = torch.cat([factors.view(torch.uint8), bytes_], -1).view(rows, -1)
    return Host((numbers - wide[0]) * wide[1], "Q4_1", blocks), scales, lows


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_groups_of_128_that_came_as_blocks_of_32_are_groups_of_128_again(rows: int) -> None:
    (weight, scales, lows), x = in_groups_of_128(70, 256), inputs(rows, 256)
    placed = place("w", [weight, weight.narrow(0, 0, 6)], [], "auto", torch.float32, HOST)
    assert (placed.group, placed.zeros, placed.shape) == (128, True, (76, 256))
    # Exact where a lowest value was rounded to fp16.
    assert (lows.float() / scales.float() % 1).any()
    assert torch.equal(dense_of(placed)[:70].float(), weight.values)
    assert torch.allclose(run_linear(weight, x), x @ weight.values.T, atol=1e-4)


@pytest.mark.parametrize("part", ["scale", "low"])
def test_blocks_that_do_not_agree_stay_groups_of_32(part: str) -> None:
    weight, *_ = in_groups_of_128(70, 256)
    assert weight.blocks is not None
    halves = weight.blocks[3, 20:24].view(torch.float16)
    halves[0 if part == "scale" else 1] += 0.01
    placed = place("w", [weight], [], "auto", torch.float32, HOST)
    assert (placed.group, placed.zeros) == (32, False)


@pytest.mark.parametrize("rows", [3, 20])
def test_int8_multiplies_whole_numbers_exactly(rows: int) -> None:
    weight, x = Host(inputs(70, 160)), inputs(rows, 160)
    found = run_linear(weight, x, weights="int8")
    steps = weight.values.abs().amax(1, keepdim=True) / 127
    largest = x.abs().amax(1, keepdim=True)
    numbers = (x * (127 / largest)).round() @ (weight.values / steps).round().T
    assert torch.allclose(found, numbers * (largest / 127) * steps.T, rtol=1e-5, atol=1e-5)


def test_ternary_weights_follow_bitnets_arithmetic() -> None:
    signs = torch.randint(-1, 2, (70, 96), generator=torch.Generator().manual_seed(0))
    weight = Host(signs * 0.5, "TERNARY", signs.to(torch.int8), scale=0.5)
    x = inputs(4, 96)
    factor = 127.0 / x.abs().amax(-1, keepdim=True)
    wanted = (x * factor).round() @ signs.float().T * (0.5 / factor)
    assert torch.allclose(run_linear(weight, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_bias_is_added(weights: str) -> None:
    weight, x, bias = Host(inputs(70, 160)), inputs(3, 160), torch.arange(70.0)
    plain = run_linear(weight, x, weights=weights)
    assert torch.allclose(run_linear(weight, x, bias, weights=weights), plain + bias, atol=1e-4)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_in_the_invariant_mode_rows_do_not_depend_on_their_number(weights: str) -> None:
    weight, x = Host(inputs(70, 160)), inputs(70, 160)
    together = run_linear(weight, x, weights=weights, invariant=True)
    for count in (1, 17):
        alone = run_linear(weight, x[:count], weights=weights, invariant=True)
        assert torch.equal(alone, together[:count])


def test_a_shift_unpacks_eight_neighbours_of_each_chunk() -> None:
    numbers = torch.randint(0, 16, (3, 200), generator=torch.Generator().manual_seed(0))
    words = pack_nibbles(numbers.to(torch.uint8))
    assert words.shape == (3, 32)
    assert torch.equal(unpack_nibbles(words, 200), numbers.int())
    halves = words.view(torch.int16)
    for part in range(4):
        found = (halves[:, 8:16] >> (part * 4)) & 15
        assert torch.equal(found.long(), numbers[:, 32 + part * 8 : 40 + part * 8])


@pytest.mark.parametrize(("weights", "columns"), [("int4", 1100), ("int8", 1100)])
def test_shares_of_the_inputs_are_added_by_the_last_to_arrive(weights: str, columns: int) -> None:
    weight, x, bias = Host(inputs(70, columns)), inputs(3, columns), torch.arange(70.0)
    kind = "group4" if weights == "int4" else "int8"
    shape = MatmulShape(3, 70, columns, kind, 128, torch.float32, True)  # type: ignore[arg-type]
    assert shape.splits > 1
    found = run_linear(weight, x, bias, weights=weights)
    # Twice: the counters are back at zero. Whole, as the invariant mode does it: the same sums.
    assert torch.equal(run_linear(weight, x, bias, weights=weights), found)
    whole = run_linear(weight, x, bias, weights=weights, invariant=True)
    assert torch.allclose(found, whole, rtol=1e-5, atol=1e-3)


def test_few_rows_split_their_inputs_until_the_device_is_full() -> None:
    one = MatmulShape(1, 4096, 4096, "group4", 128, torch.bfloat16, False)
    assert one.few
    assert one.splits == 8
    assert one.grid == (32, 1, 8)
    some = [MatmulShape(n, 4096, 4096, "group4", 128, torch.bfloat16, False) for n in (24, 64, 100)]
    assert [(s.block_out, s.block_rows, s.splits) for s in some] == [
        (128, 32, 8), (64, 64, 4), (128, 128, 4)
    ]  # fmt: skip
    many = MatmulShape(512, 4096, 4096, "group4", 128, torch.bfloat16, False)
    assert (many.splits, many.block_out, many.block_rows) == (1, 128, 128)
