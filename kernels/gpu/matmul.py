"""`x @ weight.T` for weights of 16, 8 and 4 bits.

The weight is the left operand: its outputs fill the matrix unit's fixed side of 64, the step's
rows its free one, so that few rows waste nothing and weights that are unpacked in registers are
used from there (the exchange of operands of Machete, Neural Magic 2024). For few rows the inputs
are split among programs (split-K); the last one to arrive adds all parts in order, so the sum never
depends on who came first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from kernels.gpu.fused import value_of
from kernels.gpu.launch import Config, enter

Format = Literal["float", "int8", "group8", "group4"]
# Inputs of a block of 4-bit weights: 32 halves of words, of which each shift gives 4 times 8
# neighbours.
WORD_BLOCK = 128
# Programs that few rows are split among, and shares of the inputs, at most.
WANTED = {"float": (256, 4), "int8": (512, 16), "group8": (512, 16), "group4": (2048, 8)}
MAX_FEW = 16
# Rows up to which 4-bit weights leave the device too few programs otherwise.
MAX_SPLIT = 64
# Whole numbers of 4 bits as bf16: in a number of 128 the last bits of the mantissa count ones. Then
# 128 and what stands for zero are taken away; both are exact.
WHOLE = tl.constexpr(
    """{
    .reg .b32 bits, one;
    mov.b32 one, 0x3f803f80;
    lop3.b32 bits, $4, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, bits, one, $5;
    shr.u32 bits, $4, 4;
    lop3.b32 bits, bits, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, bits, one, $5;
    shr.u32 bits, $4, 8;
    lop3.b32 bits, bits, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 $2, bits, one, $5;
    shr.u32 bits, $4, 12;
    lop3.b32 bits, bits, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 $3, bits, one, $5;
    }"""
)


@dataclass(frozen=True)
class Form:
    """How a weight is stored: elements of a row, inputs of a group, groups of a row; `zeros` if a
    group has a number that stands for zero instead of a lowest value."""

    format: Format
    stride: int = 0
    group: int = 1
    zeros: bool = False
    groups: int = 0

    @property
    def constants(self) -> dict[str, Any]:
        """As a kernel's constants."""
        return {
            "STRIDE": self.stride,
            "FORMAT": self.format,
            "GROUP": self.group,
            "ZEROS": self.zeros,
            "GROUPS": self.groups,
        }


@triton.jit
def whole_numbers(words, low, like, INLINE: tl.constexpr):
    """The four nibbles of each half word, less what stands for zero, in the type of `like`."""
    if INLINE:
        spread = low.to(tl.int16, bitcast=True)[:, None] + words * 0
        numbers = tl.inline_asm_elementwise(
            WHOLE, "=&r,=&r,=&r,=&r,r,r", [words, spread],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        less = low.to(tl.float32)[:, None] + 128.0
        numbers = (
            ((words & 15).to(tl.float32) + less).to(like),
            (((words >> 4) & 15).to(tl.float32) + less).to(like),
            (((words >> 8) & 15).to(tl.float32) + less).to(like),
            (((words >> 12) & 15).to(tl.float32) + less).to(like),
        )
    return numbers


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    out,
    x,
    x_scales,
    weight,
    scales,
    lows,
    bias,
    partial,
    arrived,
    experts,
    rows,
    outputs,
    inputs,
    stride,
    groups,
    EXPERTS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INLINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile of outputs x rows, over one share of the inputs.

    `stride` is elements (half words with 4 bits) of a weight's row. With EXPERTS a block of rows
    has its own `outputs` rows of the weight: those of the expert that is said there; none if -1.
    """
    enter(EARLY)
    block_out, block_row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    output = block_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_out, in_rows = output < outputs, row < rows
    source = x + row.to(tl.int64)[None, :] * inputs
    blocks = tl.cdiv(inputs, BLOCK_IN)
    share = tl.cdiv(blocks, SPLITS)
    first, last = split * share, tl.minimum(blocks, (split + 1) * share)
    number = output.to(tl.int64)
    if EXPERTS:
        expert = tl.load(experts + block_row)
        in_out = in_out & (expert >= 0)
        last = tl.where(expert < 0, first, last)
        number += tl.maximum(expert, 0).to(tl.int64) * outputs
    base = weight + number[:, None] * stride
    own_groups = number * groups

    if FORMAT == "int8":
        sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.int32)
    else:
        sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for block in range(first, last):
        if FORMAT == "group4":
            column = tl.arange(0, 32)
            words = tl.load(base + block * 32 + column[None, :], mask=in_out[:, None], other=0)
            k = block * BLOCK_IN + column // 8 * 32 + column % 8
            if ZEROS:
                group = own_groups + block * BLOCK_IN // GROUP
                factor = tl.load(scales + group, mask=in_out, other=0.0).to(tl.float32)
                low = tl.load(lows + group, mask=in_out, other=0.0)
                numbers = whole_numbers(words, low, x.dtype.element_ty, INLINE)
                share_sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
                for part in tl.static_range(4):
                    at = (k + part * 8)[:, None]
                    inside = (at < inputs) & in_rows[None, :]
                    values = tl.load(source + at, mask=inside, other=0.0)
                    share_sums = tl.dot(
                        numbers[part], values, share_sums, input_precision=PRECISION
                    )
                sums += share_sums * factor[:, None]
            else:
                group = own_groups[:, None] + ((block * BLOCK_IN + column // 8 * 32) // GROUP)
                factor = tl.load(scales + group, mask=in_out[:, None], other=0.0).to(tl.float32)
                low = tl.load(lows + group, mask=in_out[:, None], other=0.0).to(tl.float32)
                for part in tl.static_range(4):
                    numbers = ((words >> (part * 4)) & 15).to(tl.float32)
                    w = (numbers * factor + low).to(x.dtype.element_ty)
                    at = (k + part * 8)[:, None]
                    inside = (at < inputs) & in_rows[None, :]
                    values = tl.load(source + at, mask=inside, other=0.0)
                    sums = tl.dot(w, values, sums, input_precision=PRECISION)
        else:
            k = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
            in_k = k < inputs
            w = tl.load(base + k[None, :], mask=in_out[:, None] & in_k[None, :], other=0)
            inside = in_k[:, None] & in_rows[None, :]
            values = tl.load(source + k[:, None], mask=inside, other=0)
            if FORMAT == "group8":
                group = own_groups + block * BLOCK_IN // GROUP
                factor = tl.load(scales + group, mask=in_out, other=0.0).to(tl.float32)
                low = tl.load(lows + group, mask=in_out, other=0.0).to(tl.float32)
                w = (w.to(tl.float32) * factor[:, None] + low[:, None]).to(x.dtype.element_ty)
            if FORMAT == "int8":
                sums = tl.dot(w, values, sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(w, values, sums, input_precision=PRECISION)

    if FORMAT == "int8":
        factor = tl.load(scales + number, mask=in_out, other=0.0)
        steps = tl.load(x_scales + row, mask=in_rows, other=0.0)
        result = sums.to(tl.float32) * (factor[:, None] * steps[None, :])
    else:
        result = sums
    place = row.to(tl.int64)[None, :] * outputs + output[:, None]
    inside = in_out[:, None] & in_rows[None, :]
    if SPLITS == 1:
        if BIAS:
            result += tl.load(bias + output, mask=in_out, other=0.0)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
    else:
        size = rows.to(tl.int64) * outputs
        tl.store(partial + split * size + place, result, mask=inside)
        # Everybody's part is in memory before anybody counts it.
        tl.debug_barrier()
        counter = arrived + block_row * tl.num_programs(0) + block_out
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            result = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
            for other in tl.static_range(SPLITS):
                result += tl.load(
                    partial + other * size + place, mask=inside, other=0.0, cache_modifier=".cg"
                )
            if BIAS:
                result += tl.load(bias + output, mask=in_out, other=0.0)[:, None]
            tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
            tl.store(counter, 0)


@dataclass(frozen=True)
class MatmulShape:
    """A matmul of up to `rows` rows; `dtype` of the activations, `group` inputs of a scale."""

    rows: int
    outputs: int
    inputs: int
    format: Format
    group: int
    dtype: torch.dtype
    bias: bool
    invariant: bool = False
    hopper: bool = True
    zeros: bool = False
    inline: bool = False
    expert_rows: int = 0
    """Rows of a block that goes through an expert of its own; 0 if all rows meet one weight."""

    @property
    def few(self) -> bool:
        """Whether it is bound by reading the weight. One form serves all in the invariant mode."""
        return (self.expert_rows or self.rows) <= MAX_FEW and not self.invariant

    @property
    def block_out(self) -> int:
        """Outputs of a tile."""
        return 64 if self.few or self.dtype == torch.float32 else 128

    @property
    def block_rows(self) -> int:
        """Rows of a tile."""
        if self.few:
            return 16
        if self.expert_rows:
            return self.expert_rows
        return 64 if self.rows <= 64 or self.invariant or self.dtype == torch.float32 else 128

    @property
    def block_in(self) -> int:
        """Inputs of a tile."""
        if self.format == "group4":
            return WORD_BLOCK
        if self.format == "group8":
            return min(self.group, 64)
        if self.format == "int8":
            return 128
        if self.few and self.dtype != torch.float32:
            return 128
        return 64 if self.hopper and self.dtype != torch.float32 else 32

    @property
    def splits(self) -> int:
        """Programs that share a tile's inputs."""
        if self.expert_rows:
            return 1
        if not self.few and (self.format != "group4" or self.rows > MAX_SPLIT or self.invariant):
            return 1
        blocks = -(-self.inputs // self.block_in)
        programs, most = WANTED[self.format]
        if not self.few:
            programs, most = 512, 4
        wanted = programs // -(-self.outputs // self.block_out)
        return 1 << (max(1, min(wanted, blocks // 4, most)).bit_length() - 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles of outputs, of rows, and shares of the inputs."""
        return (-(-self.outputs // self.block_out), -(-self.rows // self.block_rows), self.splits)

    def config(self) -> Config:
        """How it is compiled."""
        wide = self.dtype == torch.float32
        return Config(
            matmul_kernel,
            {
                "EXPERTS": self.expert_rows > 0,
                "FORMAT": self.format,
                "GROUP": self.group,
                "ZEROS": self.zeros,
                "BLOCK_OUT": self.block_out,
                "BLOCK_ROWS": self.block_rows,
                "BLOCK_IN": self.block_in,
                "SPLITS": self.splits,
                "BIAS": self.bias,
                "PRECISION": "ieee" if wide else "tf32",
                "INLINE": self.inline,
            },
            warps=4 if self.block_out == 64 else 8,
            stages=2 if wide else 4 if self.few else 3,
        )


@triton.jit(do_not_specialize=["first"])
def values_kernel(
    out,
    weight,
    scales,
    lows,
    first,
    INPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A weight's rows from `first` on, as floats `[rows, INPUTS]`; 4 bits come as half words."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    source, groups = weight + (first + row) * STRIDE, (first + row) * GROUPS
    if FORMAT == "group4":
        half = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        column = half // 8 * 32 + half % 8
        inside = column < INPUTS
        words = tl.load(source + half, mask=inside, other=0)
        factor = tl.load(scales + groups + column // GROUP, mask=inside, other=0.0)
        low = tl.load(lows + groups + column // GROUP, mask=inside, other=0.0)
        for part in tl.static_range(4):
            number = ((words >> (part * 4)) & 15).to(tl.float32)
            at = column + part * 8
            place = out + row * INPUTS + at
            store_values(place, number, factor, low, at < INPUTS, ZEROS)
    else:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < INPUTS
        number = tl.load(source + column, mask=inside, other=0).to(tl.float32)
        factor = tl.load(scales + groups + column // GROUP, mask=inside, other=0.0)
        low = tl.load(lows + groups + column // GROUP, mask=inside, other=0.0)
        store_values(out + row * INPUTS + column, number, factor, low, inside, ZEROS)


@triton.jit
def store_values(place, number, factor, low, inside, ZEROS: tl.constexpr):
    """What numbers of a group stand for."""
    value = value_of(number, factor.to(tl.float32), low.to(tl.float32), ZEROS)
    tl.store(place, value.to(place.dtype.element_ty), mask=inside)
