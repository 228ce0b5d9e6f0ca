"""Weights as the GPU kernels read them.

Quantized blocks keep their bits: 4-bit ones become nibbles with a scale and a lowest value for each
group of 32, MXFP4's nibbles with a power of two, 8-bit ones int8 in groups of 32. `int4` packs a
float checkpoint in groups of 128 with a scale and the number that stands for zero, `int8` in one
scale an output with int8 activations; ternary weights are such int8 weights, which is BitNet's own
arithmetic. Everything else is stored in `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kernels.backend import HostTensor, TernaryTensor, WeightFormat
from kernels.gpu.matmul import FOUR_BITS, WORD_BLOCK, Form, Format
from kernels.ops import Weight

GGUF_GROUP = 32
INT4_GROUP = 128
# The smallest positive fp16 number.
LEAST_HALF = 2.0**-24
# A nibble's bits in a bf16 number of this size are it and the nibble.
BF16_ZERO = 128
# The largest number that stands for zero: 4 bits, and one more in GPTQ's first version.
MOST_ZERO = 16


@dataclass(frozen=True, eq=False)
class GpuWeight(Weight):
    """A placed weight.

    `tensor` is `[out, in]` float or int8, `[out, words]` int32 with 4 bits, or a vector `[n]` fp32.
    `scales` is fp32 `[out]` for `int8`, else `scales` and `lows` are fp16 `[out, groups]`: a value
    is `number * scale + low`. With `zeros`, `lows` is bf16: minus 128 and the number that stands
    for zero, which bf16 holds exactly: a value is `(number - zero) * scale`. Of `float4` numbers
    are floats of 4 bits, `scales` is bf16, and there are no `lows`. `bias` is fp32 `[out]`.
    """

    format: Format
    tensor: torch.Tensor
    scales: torch.Tensor | None = None
    lows: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    group: int = 0
    zeros: bool = False
    wide: bool = False
    """Whether what is multiplied with it stays in fp32, as routers' scores do."""

    @property
    def groups(self) -> int:
        """Groups of a row; 0 of a weight without."""
        return self.scales.shape[1] if self.scales is not None and self.scales.dim() == 2 else 0

    @property
    def stride(self) -> int:
        """Elements of a row."""
        return self.tensor.shape[-1]

    @property
    def cells(self) -> torch.Tensor:
        """What matrix units' kernels read: of 4 bits halves of words, int16, else the elements."""
        return self.tensor.view(torch.int16) if self.format in FOUR_BITS else self.tensor

    @property
    def form(self) -> Form:
        """What kernels are compiled for."""
        return Form(self.format, self.stride, self.group or 1, self.zeros, self.groups)

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.tensor, self.scales, self.lows, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Groups:
    """A matrix in groups: `numbers` uint8 or int8 `[out, in]`, `scales`, `lows` `[out, groups]`;
    with `zeros` the lowest values are no numbers of their own, but `-zeros * scales`."""

    numbers: torch.Tensor
    scales: torch.Tensor
    lows: torch.Tensor
    zeros: torch.Tensor | None = None


def place(
    name: str,
    parts: Sequence[HostTensor],
    bias: Sequence[HostTensor],
    weight_format: WeightFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> GpuWeight:
    """Convert stacked parts on the host and copy them to the device."""
    added = torch.cat([b.dense().float() for b in bias]).to(device) if bias else None
    if len(parts[0].shape) == 1:
        vector = torch.cat([part.dense().float() for part in parts])
        return GpuWeight(name, tuple(vector.shape), "float", vector.to(device))
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    kinds = {part.format for part in parts}
    if kinds == {"TERNARY"}:
        ternary = [cast("TernaryTensor", part) for part in parts]
        signs = torch.cat([part.signs().to(device) for part in ternary])
        steps = torch.cat([torch.full((part.shape[0],), part.scale) for part in ternary])
        return GpuWeight(name, shape, "int8", signs, steps.float().to(device), bias=added)
    if weight_format in ("auto", "int4") and kinds == {"MXFP4"}:
        return _floats4(name, shape, parts, added, device)
    if weight_format == "auto" and all(kind in READERS for kind in kinds):
        four = kinds <= NIBBLES
        if four or not kinds & NIBBLES:
            # One after another, here and below: what packing takes is many times what it leaves.
            groups = (READERS[part.format](part.packed(), part.shape[1]) for part in parts)
            packed = [_packed(g, 4 if four else 8, device) for g in groups]
            larger = [_larger_groups(g, shape[1]) for g in packed] if four else [None]
            if None not in larger:
                return _stacked(name, shape, [g for g in larger if g], 4, INT4_GROUP, added)
            return _stacked(name, shape, packed, 4 if four else 8, GGUF_GROUP, added)
    if weight_format not in ("int4", "int8"):
        stacked = torch.cat([part.dense().to(device, dtype) for part in parts])
        return GpuWeight(name, shape, "float", stacked, bias=added)
    dense = (part.dense().to(device).float() for part in parts)
    if weight_format == "int4":
        packed = [_packed(quantize_groups(part, INT4_GROUP), 4, device) for part in dense]
        return _stacked(name, shape, packed, 4, INT4_GROUP, added)
    rows = [_whole_rows(part) for part in dense]
    numbers, steps = (torch.cat(pieces) for pieces in zip(*rows, strict=True))
    return GpuWeight(name, shape, "int8", numbers, steps, bias=added)


def _whole_rows(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 numbers, and each one's step."""
    steps = dense.abs().amax(1).clamp(min=1e-12) / 127
    return (dense / steps[:, None]).round().to(torch.int8), steps


def column_unit(parts: Sequence[HostTensor], weight_format: WeightFormat) -> int | None:
    """See `Backend.column_unit`: int8 weights have one scale for a whole row."""
    kinds = {part.format for part in parts}
    if kinds == {"TERNARY"} or weight_format == "int8":
        return None
    unit = {"auto": GGUF_GROUP, "int4": INT4_GROUP}.get(weight_format, 1)
    if weight_format == "auto" and not kinds <= READERS.keys():
        unit = 1
    return math.lcm(unit, *(part.block for part in parts))


def quantize_groups(dense: torch.Tensor, group: int) -> Groups:
    """Round a matrix to 4 bits with a scale and a zero a group; `dense` `[out, in]`."""
    rows, columns = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -columns % group))
    blocks = padded.view(rows, -1, group)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=LEAST_HALF).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = ((blocks / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    numbers = numbers.view(rows, -1)[:, :columns].to(torch.uint8)
    return Groups(numbers, scales, -zeros * scales, zeros)


def pack_nibbles(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits, uint8 `[out, in]`, as int32 `[out, words]`, 4 words for 32 inputs. As 8
    halves of 16 bits, half j holds inputs j, 8 + j, 16 + j and 24 + j from its lowest nibble on, so
    that a shift unpacks 8 neighbours for the matrix units, and the even and odd nibbles of a word
    are bytes for dot products of 4."""
    rows, columns = numbers.shape
    padded = torch.nn.functional.pad(numbers, (0, -columns % WORD_BLOCK))
    blocks = padded.view(rows, -1, 4, 4, 2).to(torch.int64)
    nibble = torch.arange(0, 16, 4, device=numbers.device)[:, None, None]
    half = torch.arange(0, 32, 16, device=numbers.device)
    words = (blocks << (nibble + half)).sum((2, 4))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).view(rows, -1).contiguous()


def unpack_nibbles(words: torch.Tensor, columns: int) -> torch.Tensor:
    """What `pack_nibbles` packed, int32 `[out, in]`."""
    nibble = torch.arange(0, 16, 4, device=words.device)[:, None, None]
    half = torch.arange(0, 32, 16, device=words.device)
    blocks = words.view(len(words), -1, 1, 4, 1) >> (nibble + half)
    return (blocks & 15).reshape(len(words), -1)[:, :columns]


def _packed(groups: Groups, bits: int, device: torch.device) -> Groups:
    """A part on the device, its numbers as words if they have 4 bits."""
    numbers = pack_nibbles(groups.numbers) if bits == 4 else groups.numbers
    zeros = None if groups.zeros is None else groups.zeros.to(device)
    return Groups(numbers.to(device), groups.scales.to(device), groups.lows.to(device), zeros)


def _larger_groups(groups: Groups, columns: int) -> Groups | None:
    """The same numbers in groups of `INT4_GROUP`, with zeros, if that is what they were made from:
    if neighbours agree and lowest values are whole numbers of steps, rounded to fp16 (GPTQ, AWQ).
    What they stand for is then exact again."""
    if columns % INT4_GROUP:
        return None
    size = (len(groups.scales), -1, INT4_GROUP // GGUF_GROUP)
    scales, lows = groups.scales.view(size), groups.lows.view(size)
    scale, low = scales[..., :1], lows[..., :1]
    zeros = -(low / scale.where(scale != 0, 1)).round()
    # Half of what fp16 tells apart, of numbers and of its smallest ones.
    whole = (low + zeros * scale).abs() <= low.abs() * 2**-11 + 2**-25
    fits = (scales == scale) & (lows == low) & whole & (zeros >= 0) & (zeros <= MOST_ZERO)
    if not bool(fits.all()):
        return None
    return Groups(groups.numbers, scale[..., 0], low[..., 0], zeros[..., 0])


def _stacked(
    name: str,
    shape: tuple[int, int],
    groups: Sequence[Groups],
    bits: int,
    group: int,
    bias: torch.Tensor | None,
) -> GpuWeight:
    tensor = torch.cat([g.numbers for g in groups])
    scales = torch.cat([g.scales for g in groups]).half()
    zeros = [g.zeros for g in groups if g.zeros is not None]
    if zeros:
        lows = -(torch.cat(zeros) + BF16_ZERO).bfloat16()
    else:
        lows = torch.cat([g.lows for g in groups]).half()
    scales, lows = (_filled(each, shape[1], group) for each in (scales, lows))
    kind: Format = "group4" if bits == 4 else "group8"
    return GpuWeight(
        name,
        shape,
        kind,
        tensor,
        scales,
        lows,
        bias,
        group,
        bool(zeros),
    )


def _filled(groups: torch.Tensor, inputs: int, group: int) -> torch.Tensor:
    """Numbers of groups `[out, groups]` with zeros behind them: the kernel walks whole blocks of
    128 inputs, and reads one for each group of them."""
    spare = -(-inputs // WORD_BLOCK) * WORD_BLOCK // group - groups.shape[1]
    return torch.nn.functional.pad(groups, (0, spare)).contiguous()


def _floats4(
    name: str,
    shape: tuple[int, int],
    parts: Sequence[HostTensor],
    bias: torch.Tensor | None,
    device: torch.device,
) -> GpuWeight:
    """MXFP4 in its own bits: floats of four bits under a power of two."""
    numbers, scales = [], []
    for part in parts:
        blocks = part.packed().to(device).view(part.shape[0], -1, 17)
        numbers.append(pack_nibbles(_nibbles(blocks[..., 1:]).view(part.shape)))
        exponents = blocks[..., 0].float() - 127
        scales.append(torch.ldexp(torch.ones_like(exponents), exponents).bfloat16())
    stacked = _filled(torch.cat(scales), shape[1], GGUF_GROUP)
    return GpuWeight(
        name, shape, "float4", torch.cat(numbers), stacked, bias=bias, group=GGUF_GROUP
    )


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Pairs of bytes as fp32 numbers: uint8 `[..., 2 n]` to `[..., n]`."""
    return blocks.contiguous().view(torch.float16).float()


def _nibbles(bytes_: torch.Tensor) -> torch.Tensor:
    """ggml's order: a block's low nibbles, then its high ones, `[..., n]` to `[..., 2 n]`."""
    return torch.cat([bytes_ & 15, bytes_ >> 4], -1)


def _read_q4_0(raw: torch.Tensor, columns: int) -> Groups:
    blocks = raw.view(raw.shape[0], -1, 18)
    scales = _halves(blocks[..., :2])[..., 0]
    return Groups(_nibbles(blocks[..., 2:]).view(-1, columns), scales, -8 * scales)


def _read_q4_1(raw: torch.Tensor, columns: int) -> Groups:
    blocks = raw.view(raw.shape[0], -1, 20)
    scales, lows = _halves(blocks[..., :4]).unbind(-1)
    return Groups(_nibbles(blocks[..., 4:]).view(-1, columns), scales, lows)


def _read_q8_0(raw: torch.Tensor, columns: int) -> Groups:
    blocks = raw.view(raw.shape[0], -1, 34)
    scales = _halves(blocks[..., :2])[..., 0]
    numbers = blocks[..., 2:].contiguous().view(torch.int8)
    return Groups(numbers.view(-1, columns), scales, torch.zeros_like(scales))


def _read_q4_k(raw: torch.Tensor, columns: int) -> Groups:
    """Blocks of 256: two fp16 factors, eight 6-bit scales and lowest values, 128 bytes."""
    blocks = raw.view(raw.shape[0], -1, 144)
    factor, low = _halves(blocks[..., :4]).unbind(-1)
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], -1)
    lows = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], -1)
    numbers = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return Groups(
        numbers.reshape(-1, columns),
        (factor[..., None] * scales).flatten(1),
        (-low[..., None] * lows).flatten(1),
    )


READERS = {"Q4_0": _read_q4_0, "Q4_1": _read_q4_1, "Q8_0": _read_q8_0, "Q4_K": _read_q4_k}
NIBBLES = {"Q4_0", "Q4_1", "Q4_K"}


def gpu(weight: Weight) -> GpuWeight:
    """The form of a weight that this backend placed."""
    assert isinstance(weight, GpuWeight)
    return weight
