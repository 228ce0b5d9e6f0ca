"""`x @ weight.T` of one row, with what stands before and behind it in a layer.

Such a step is bound by reading weights, and by the gaps between kernels. So there are few kernels:
a norm comes with the matmul behind it, a gate and the residual's addition with the one before. And
there are no gaps: each reads its first weights while the kernel before it still runs.

4-bit numbers are multiplied as whole numbers, four at a time (dp4a): the row becomes two digits of
8 bits with a scale for each 32 inputs, which keeps 14 bits of the largest, more than bf16 has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.fused import ROUND, gate_of
from kernels.gpu.launch import Config, enter, power_of_two
from kernels.gpu.matmul import Form

# Inputs that share a scale of a row's digits.
CHUNK = 32
# Four products of bytes each, of both digits, for both halves of a word of nibbles.
PRODUCTS = tl.constexpr(
    """{
    .reg .b32 even, odd, high, low;
    and.b32 even, $1, 0x0f0f0f0f;
    shr.u32 odd, $1, 4;
    and.b32 odd, odd, 0x0f0f0f0f;
    dp4a.s32.s32 high, even, $2, 0;
    dp4a.s32.s32 high, odd, $3, high;
    dp4a.s32.s32 low, even, $4, 0;
    dp4a.s32.s32 low, odd, $5, low;
    mad.lo.s32 $0, high, 128, low;
    }"""
)


@triton.jit
def finish(result, up, out, bias, residual, output, outputs, ACTIVATION: tl.constexpr,
           BIAS: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """What comes behind the sums: bias, gate, residual; then they are stored."""
    inside = output < outputs
    if BIAS:
        result += tl.load(bias + output, mask=inside, other=0.0)
        if ACTIVATION != "":
            up += tl.load(bias + outputs + output, mask=inside, other=0.0)
    if ACTIVATION != "":
        result = gate_of(result, up, ACTIVATION)
    if ADD:
        result += tl.load(residual + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def read(places, inside, WHOLE: tl.constexpr):
    """What lies there; all of it is inside if WHOLE."""
    return tl.load(places) if WHOLE else tl.load(places, mask=inside, other=0)


@triton.jit
def read_once(places, inside, WHOLE: tl.constexpr):
    """The same of weights, which need not stay in the cache."""
    if WHOLE:
        values = tl.load(places, eviction_policy="evict_first")
    else:
        values = tl.load(places, mask=inside, other=0, eviction_policy="evict_first")
    return values


@triton.jit
def float_row_kernel(
    out,
    x,
    weight,
    bias,
    residual,
    norm,
    eps,
    outputs,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some outputs of a float weight `[outputs, INPUTS]`; with ACTIVATION it has twice as many, and
    the second half is gated by the first. With NORM the row is x's RMS norm."""
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    row = tl.minimum(output, outputs - 1).to(tl.int64)
    base = weight + row[:, None] * INPUTS + column[None, :]
    other = base + outputs.to(tl.int64) * INPUTS
    first = read_once(base, column[None, :] < INPUTS, WHOLE)
    if ACTIVATION != "":
        second = read_once(other, column[None, :] < INPUTS, WHOLE)
    enter(EARLY)
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    ups = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    squares = tl.zeros([BLOCK_IN], tl.float32)
    for block in tl.static_range(0, (INPUTS + BLOCK_IN - 1) // BLOCK_IN):
        at = block * BLOCK_IN + column
        inside = at < INPUTS
        values = read(x + at, inside, WHOLE).to(tl.float32)
        if NORM:
            squares += values * values
            values *= read(norm + at, inside, WHOLE)
        if block > 0:
            first = read_once(base + block * BLOCK_IN, inside[None, :], WHOLE)
        sums += first.to(tl.float32) * values[None, :]
        if ACTIVATION != "":
            if block > 0:
                second = read_once(other + block * BLOCK_IN, inside[None, :], WHOLE)
            ups += second.to(tl.float32) * values[None, :]
    result, up = tl.sum(sums, 1), tl.sum(ups, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)
        result, up = result * factor, up * factor
    finish(result, up, out, bias, residual, output, outputs, ACTIVATION, BIAS, ADD)


@triton.jit
def digits_kernel(
    digits,
    steps,
    totals,
    x,
    norm,
    eps,
    inputs,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row, or its RMS norm, as whole numbers: `digits` int8 `[4, padded / 2]` are the high digits
    of even and of odd nibbles, then the low ones, in the order of the words that they meet;
    `steps` and `totals` fp32 `[padded / 32]` are a chunk's unit and its sum."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Byte b of word w has inputs 2 w, 16 + 2 w, 1 + 2 w and 17 + 2 w, and those 8 further.
    even = place // 16 * 32 + place % 16 // 4 * 2 + place % 2 * 16 + place % 4 // 2
    odd = even + 8
    if NORM:
        norm_a = tl.load(norm + even, mask=even < INPUTS, other=0.0)
        norm_b = tl.load(norm + odd, mask=odd < INPUTS, other=0.0)
    enter(EARLY)
    a = tl.load(x + even, mask=even < INPUTS, other=0.0).to(tl.float32)
    b = tl.load(x + odd, mask=odd < INPUTS, other=0.0).to(tl.float32)
    if NORM:
        # One program has it all.
        factor = tl.rsqrt(tl.sum(a * a + b * b, 0) / INPUTS + eps)
        a, b = a * (factor * norm_a), b * (factor * norm_b)
    a, b = tl.reshape(a, [BLOCK // 16, 16]), tl.reshape(b, [BLOCK // 16, 16])
    largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1)
    step = tl.maximum(largest, 1e-30) / 16256.0
    whole_a = a / step[:, None] + ROUND - ROUND
    whole_b = b / step[:, None] + ROUND - ROUND
    chunk = tl.program_id(0) * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
    inside = chunk < inputs // 32
    tl.store(steps + chunk, step, mask=inside)
    tl.store(totals + chunk, tl.sum(whole_a + whole_b, 1) * step, mask=inside)
    high_a = whole_a / 128.0 + ROUND - ROUND
    high_b = whole_b / 128.0 + ROUND - ROUND
    plane, wanted = inputs // 2, place < inputs // 2
    place = digits + place
    whole_a, whole_b = whole_a - 128.0 * high_a, whole_b - 128.0 * high_b
    tl.store(place, tl.reshape(high_a, [BLOCK]).to(tl.int8), mask=wanted)
    tl.store(place + plane, tl.reshape(high_b, [BLOCK]).to(tl.int8), mask=wanted)
    tl.store(place + 2 * plane, tl.reshape(whole_a, [BLOCK]).to(tl.int8), mask=wanted)
    tl.store(place + 3 * plane, tl.reshape(whole_b, [BLOCK]).to(tl.int8), mask=wanted)


@triton.jit
def products(words, high_even, high_odd, low_even, low_odd, INLINE: tl.constexpr):
    """Eight products of a word's nibbles with a row's digits, added, int32."""
    zero = words * 0
    if INLINE:
        result = tl.inline_asm_elementwise(
            PRODUCTS, "=r,r,r,r,r,r",
            [words, high_even + zero, high_odd + zero, low_even + zero, low_odd + zero],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        result = zero
        for byte in tl.static_range(4):
            even, odd = (words >> (8 * byte)) & 15, (words >> (8 * byte + 4)) & 15
            result += even * (digit(high_even, byte) * 128 + digit(low_even, byte))
            result += odd * (digit(high_odd, byte) * 128 + digit(low_odd, byte))
    return result


@triton.jit
def digit(word, byte: tl.constexpr):
    """A byte of a word, with its sign."""
    return (word << (24 - 8 * byte)) >> 24


@triton.jit
def weighted(whole, step, total, scales, lows, known, WHOLE: tl.constexpr, ZEROS: tl.constexpr):
    """A chunk's sum of whole numbers as the value that it stands for."""
    scale = read(scales, known, WHOLE).to(tl.float32)
    low = read(lows, known, WHOLE).to(tl.float32)
    if ZEROS:
        value = (whole * step + (low + 128.0) * total) * scale
    else:
        value = whole * step * scale + low * total
    return value


@triton.jit
def digits_row_kernel(
    out,
    digits,
    steps,
    totals,
    weight,
    scales,
    lows,
    bias,
    residual,
    outputs,
    groups,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INLINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some outputs of a 4-bit weight `[outputs, WORDS]` for a row of digits (int32 here)."""
    CHUNKS: tl.constexpr = BLOCK_IN // 4
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column, chunk = tl.arange(0, BLOCK_IN), tl.arange(0, CHUNKS)
    row = tl.minimum(output, outputs - 1).to(tl.int64)[:, None]
    base = weight + row * WORDS + column[None, :]
    other = base + outputs.to(tl.int64) * WORDS
    first = read_once(base, column[None, :] < WORDS, WHOLE)
    if ACTIVATION != "":
        second = read_once(other, column[None, :] < WORDS, WHOLE)
    enter(EARLY)
    sums = tl.zeros([BLOCK_OUT, CHUNKS], tl.float32)
    ups = tl.zeros([BLOCK_OUT, CHUNKS], tl.float32)
    for block in tl.static_range(0, (WORDS + BLOCK_IN - 1) // BLOCK_IN):
        at, here = block * BLOCK_IN + column, block * CHUNKS + chunk
        inside, known = at < WORDS, here < WORDS // 4
        high_even = read(digits + at, inside, WHOLE)[None, :]
        high_odd = read(digits + WORDS + at, inside, WHOLE)[None, :]
        low_even = read(digits + 2 * WORDS + at, inside, WHOLE)[None, :]
        low_odd = read(digits + 3 * WORDS + at, inside, WHOLE)[None, :]
        step = read(steps + here, known, WHOLE)[None, :]
        total = read(totals + here, known, WHOLE)[None, :]
        place = row * groups + (here * 32 // GROUP)[None, :]
        if block > 0:
            first = read_once(base + block * BLOCK_IN, inside[None, :], WHOLE)
        whole = products(first, high_even, high_odd, low_even, low_odd, INLINE)
        whole = tl.sum(tl.reshape(whole, [BLOCK_OUT, CHUNKS, 4]), 2).to(tl.float32)
        sums += weighted(
            whole, step, total, scales + place, lows + place, known[None, :], WHOLE, ZEROS
        )
        if ACTIVATION != "":
            if block > 0:
                second = read_once(other + block * BLOCK_IN, inside[None, :], WHOLE)
            whole = products(second, high_even, high_odd, low_even, low_odd, INLINE)
            whole = tl.sum(tl.reshape(whole, [BLOCK_OUT, CHUNKS, 4]), 2).to(tl.float32)
            place += outputs.to(tl.int64) * groups
            ups += weighted(
                whole, step, total, scales + place, lows + place, known[None, :], WHOLE, ZEROS
            )
    finish(
        tl.sum(sums, 1), tl.sum(ups, 1), out, bias, residual, output, outputs, ACTIVATION, BIAS, ADD
    )


@dataclass(frozen=True)
class RowShape:
    """A matmul of one row: `outputs` after the gate, `inputs`; `inline` where machine instructions
    can be written out."""

    outputs: int
    inputs: int
    form: Form
    bias: bool = False
    norm: bool = False
    add: bool = False
    activation: str = ""
    inline: bool = False
    hopper: bool = True

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Outputs of a program, the columns or words that it reads at once, and its warps: what was
        fastest on an H200."""
        gated = self.activation != ""
        if self.form.format == "group4":
            # A warp alone runs out of registers where rows are longer.
            alone = self.inputs <= 4096 if gated else 8192 <= self.inputs <= 14336 and self.hopper
            outputs, warps = 2 if gated else 4, 1 if alone else 2
            return outputs, min(256, power_of_two(self.form.stride)), warps
        if gated and self.inputs <= 2048:
            return 1, power_of_two(self.inputs), 2
        return 4, min(1024, power_of_two(self.inputs)), 4

    @property
    def grid(self) -> tuple[int]:
        """Programs."""
        return (-(-self.outputs // self.blocks[0]),)

    def config(self) -> Config:
        """How the matmul is compiled."""
        block_out, block_in, warps = self.blocks
        columns = self.form.stride if self.form.format == "group4" else self.inputs
        shared: dict[str, Any] = {
            "BLOCK_OUT": block_out,
            "BLOCK_IN": block_in,
            "WHOLE": columns % block_in == 0,
            "BIAS": self.bias,
            "ADD": self.add,
            "ACTIVATION": self.activation,
        }
        if self.form.format == "group4":
            form = self.form
            more: dict[str, Any] = {"WORDS": form.stride, "GROUP": form.group, "ZEROS": form.zeros}
            more["INLINE"] = self.inline
            return Config(digits_row_kernel, {**shared, **more}, warps, stages=1)
        more = {"INPUTS": self.inputs, "NORM": self.norm}
        return Config(float_row_kernel, {**shared, **more}, warps, stages=1)

    def digits_config(self) -> tuple[Config, int]:
        """How the row's digits are made, and by how many programs."""
        halves = self.form.stride * 4
        block = power_of_two(halves) if self.norm else min(512, power_of_two(halves))
        constants = {"INPUTS": self.inputs, "BLOCK": block, "NORM": self.norm}
        return Config(digits_kernel, constants, max(1, min(16, block // 128))), -(-halves // block)


@dataclass(frozen=True)
class Digits:
    """A row as whole numbers, as `digits_kernel` leaves it."""

    numbers: torch.Tensor
    steps: torch.Tensor
    totals: torch.Tensor


def digits_of(x: torch.Tensor, shape: RowShape, norm: torch.Tensor | None, eps: float) -> Digits:
    """A row `[1, inputs]`, or its RMS norm, as digits."""
    padded = shape.form.stride * 8
    made = Digits(
        torch.empty(4, shape.form.stride, dtype=torch.int32, device=x.device),
        torch.empty(padded // CHUNK, dtype=torch.float32, device=x.device),
        torch.empty(padded // CHUNK, dtype=torch.float32, device=x.device),
    )
    config, programs = shape.digits_config()
    numbers = made.numbers.view(torch.int8)
    config.launch(
        (programs,), numbers, made.steps, made.totals, x, norm if norm is not None else x, eps,
        padded,
    )  # fmt: skip
    return made
