"""`x @ weight.T` for weights of 16, 8 and 4 bits.

The weight is the left operand: its outputs fill the matrix unit's fixed side of 64, the step's
rows its free one, so that few rows waste nothing and weights that are unpacked in registers are
used from there (the exchange of operands of Machete, Neural Magic 2024). For few rows the inputs
are split among programs (split-K); the last one to arrive adds all parts in order, so the sum never
depends on who came first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.fused import float4_of, value_of
from kernels.gpu.launch import Config, enter

Format = Literal["float", "int8", "group8", "group4", "float4"]
# Those whose numbers come as half words, four in each.
FOUR_BITS = ("group4", "float4")
# Inputs of a block of 4-bit weights: 32 halves of words, of which each shift gives 4 times 8
# neighbours.
WORD_BLOCK = 128
# Programs that few rows are split among, and shares of the inputs, at most.
WANTED = {"float": (256, 4), "int8": (512, 16), "group8": (512, 16), "group4": (512, 8)}
WANTED["float4"] = WANTED["group4"]
MAX_FEW = 16


class Tile(NamedTuple):
    """How a matmul is cut, and the programs that its inputs are split among."""

    outputs: int
    rows: int
    warps: int
    stages: int
    programs: int


# Of 4-bit weights in bf16 for up to so many rows: what was fastest on an H200.
FOUR_BIT_TILES = {
    16: Tile(128, 16, 4, 3, 512),
    32: Tile(128, 32, 4, 3, 256),
    64: Tile(64, 64, 4, 4, 256),
    128: Tile(128, 128, 8, 3, 128),
}
# Whole numbers of 4 bits as bf16: in a number of 128 the last bits of the mantissa count ones. Then
# 128 and what stands for zero are taken away; both are exact. One for each nibble of a half word.
WHOLE = tl.constexpr(
    tuple(
        f"""{{
        .reg .b32 bits, one;
        mov.b32 one, 0x3f803f80;
        shr.u32 bits, $1, {shift};
        lop3.b32 bits, bits, 0x000f000f, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, bits, one, $2;
        }}"""
        for shift in (0, 4, 8, 12)
    )
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
def whole_number(words, low, part: tl.constexpr, like, INLINE: tl.constexpr):
    """A nibble of each half word, less what stands for zero, in the type of `like`."""
    if INLINE:
        spread = low.to(tl.int16, bitcast=True)[:, None] + words * 0
        numbers = tl.inline_asm_elementwise(
            WHOLE[part], "=r,r,r", [words, spread], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        less = low.to(tl.float32)[:, None] + 128.0
        numbers = (((words >> (part * 4)) & 15).to(tl.float32) + less).to(like)
    return numbers


@triton.jit
def in_order(first, second, third, fourth):
    """The four nibbles of half words `[rows, halves]`, in the order of their inputs `[rows, 4 *
    halves]`: eight half words have 32 neighbours."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    eights = tl.reshape(pairs, [first.shape[0], first.shape[1] // 8, 8, 2, 2])
    return tl.reshape(tl.permute(eights, (0, 1, 3, 4, 2)), [first.shape[0], 4 * first.shape[1]])


@triton.jit
def values_in_order(words, factor, low, ZEROS: tl.constexpr, kind):
    """What the nibbles of half words stand for, as `kind`, in the order of their inputs; `factor`
    and `low` have one value for each half word, or for each row of them."""
    return in_order(
        value_of((words & 15).to(tl.float32), factor, low, ZEROS).to(kind),
        value_of(((words >> 4) & 15).to(tl.float32), factor, low, ZEROS).to(kind),
        value_of(((words >> 8) & 15).to(tl.float32), factor, low, ZEROS).to(kind),
        value_of(((words >> 12) & 15).to(tl.float32), factor, low, ZEROS).to(kind),
    )


@triton.jit
def floats_in_order(words, factor, kind):
    """As `values_in_order`, of nibbles that are floats."""
    return in_order(
        (float4_of(words) * factor).to(kind),
        (float4_of(words >> 4) * factor).to(kind),
        (float4_of(words >> 8) * factor).to(kind),
        (float4_of(words >> 12) * factor).to(kind),
    )


@triton.jit
def spread_chunks(x):
    """What belongs to 32 inputs `[rows, chunks]`, for each of their half words."""
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], 8])
    return tl.reshape(wide, [x.shape[0], 8 * x.shape[1]])


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
    if FORMAT == "group4" and ZEROS:
        # A group's numbers are on their way while the one before it is multiplied: loads of two
        # bytes are not among those that the compiler sends ahead.
        group = own_groups + tl.minimum(first, blocks - 1) * BLOCK_IN // GROUP
        next_factor = tl.load(scales + group, mask=in_out, other=0.0)
        next_low = tl.load(lows + group, mask=in_out, other=0.0)
    for block in range(first, last):
        k = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
        in_k = k < inputs
        values = tl.load(source + k[:, None], mask=in_k[:, None] & in_rows[None, :], other=0)
        if FORMAT == "group4" or FORMAT == "float4":
            words = tl.load(
                base + block * 32 + tl.arange(0, 32)[None, :], mask=in_out[:, None], other=0
            )
            if ZEROS:
                factor, low = next_factor.to(tl.float32), next_low
                group = own_groups + tl.minimum(block + 1, last - 1) * BLOCK_IN // GROUP
                next_factor = tl.load(scales + group, mask=in_out, other=0.0)
                next_low = tl.load(lows + group, mask=in_out, other=0.0)
                w = in_order(
                    whole_number(words, low, 0, x.dtype.element_ty, INLINE),
                    whole_number(words, low, 1, x.dtype.element_ty, INLINE),
                    whole_number(words, low, 2, x.dtype.element_ty, INLINE),
                    whole_number(words, low, 3, x.dtype.element_ty, INLINE),
                )
                zero = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
                sums += tl.dot(w, values, zero, input_precision=PRECISION) * factor[:, None]
            else:
                # Eight half words have 32 neighbours, which share their group.
                chunk = block * BLOCK_IN + tl.arange(0, BLOCK_IN // 32) * 32
                group = own_groups[:, None] + (chunk // GROUP)[None, :]
                known = in_out[:, None] & (chunk < inputs)[None, :]
                factor = tl.load(scales + group, mask=known, other=0.0).to(tl.float32)
                if FORMAT == "float4":
                    w = floats_in_order(words, spread_chunks(factor), x.dtype.element_ty)
                else:
                    low = tl.load(lows + group, mask=known, other=0.0).to(tl.float32)
                    factor, low = spread_chunks(factor), spread_chunks(low)
                    w = values_in_order(words, factor, low, False, x.dtype.element_ty)
                sums = tl.dot(w, values, sums, input_precision=PRECISION)
        else:
            w = tl.load(base + k[None, :], mask=in_out[:, None] & in_k[None, :], other=0)
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
            result += tl.load(bias + number, mask=in_out, other=0.0)[:, None]
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
                result += tl.load(bias + number, mask=in_out, other=0.0)[:, None]
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
    def _four_bit_tile(self) -> Tile | None:
        """The one of `FOUR_BIT_TILES` that is taken, if any is."""
        if self.format not in FOUR_BITS or self.dtype == torch.float32 or self.invariant:
            return None
        rows = self.expert_rows or self.rows
        return next((tile for most, tile in FOUR_BIT_TILES.items() if rows <= most), None)

    @property
    def block_out(self) -> int:
        """Outputs of a tile."""
        if tile := self._four_bit_tile:
            return tile.outputs
        return 64 if self.few or self.dtype == torch.float32 else 128

    @property
    def block_rows(self) -> int:
        """Rows of a tile."""
        if self.expert_rows:
            return self.expert_rows
        if tile := self._four_bit_tile:
            return tile.rows
        if self.few:
            return 16
        return 64 if self.rows <= 64 or self.invariant or self.dtype == torch.float32 else 128

    @property
    def block_in(self) -> int:
        """Inputs of a tile."""
        if self.format in FOUR_BITS:
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
        tile = self._four_bit_tile
        if self.expert_rows or not (self.few or tile):
            return 1
        blocks = -(-self.inputs // self.block_in)
        programs, most = WANTED[self.format]
        if tile:
            programs = tile.programs
        wanted = programs // -(-self.outputs // self.block_out)
        return 1 << (max(1, min(wanted, blocks // 4, most)).bit_length() - 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles of outputs, of rows, and shares of the inputs."""
        return (-(-self.outputs // self.block_out), -(-self.rows // self.block_rows), self.splits)

    def config(self) -> Config:
        """How it is compiled."""
        wide = self.dtype == torch.float32
        warps, stages = 4 if self.block_out == 64 else 8, 2 if wide else 4 if self.few else 3
        if tile := self._four_bit_tile:
            warps, stages = tile.warps, tile.stages
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
            warps=warps,
            stages=stages,
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
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INPUTS
    if FORMAT == "group4":
        # Eight half words have 32 neighbours, which share their group.
        chunk = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        known = chunk * 32 < INPUTS
        half = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
        words = tl.load(source + half, mask=known[:, None], other=0)
        place = groups + chunk * 32 // GROUP
        factor = tl.load(scales + place, mask=known, other=0.0).to(tl.float32)[:, None]
        low = tl.load(lows + place, mask=known, other=0.0).to(tl.float32)[:, None]
        # In order of their places before they are stored: as they lie in registers, a store would
        # take 16 bytes of every 64, which was more than twice as slow.
        ordered = values_in_order(words, factor, low, ZEROS, out.dtype.element_ty)
        result = tl.reshape(ordered, [BLOCK])
    else:
        number = tl.load(source + column, mask=inside, other=0).to(tl.float32)
        place = groups + column // GROUP
        factor = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(lows + place, mask=inside, other=0.0).to(tl.float32)
        result = value_of(number, factor, low, ZEROS).to(out.dtype.element_ty)
    tl.store(out + row * INPUTS + column, result, mask=inside)


def dense_linear(
    out: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """A float matmul through cuBLAS, summed in fp32 and rounded once."""
    matrix = values.t()
    if out.dtype == x.dtype:
        torch.mm(x, matrix, out=out)
    elif x.is_cuda:
        torch.mm(x, matrix, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), matrix.to(out.dtype), out=out)
    if bias is not None:
        out.add_(bias)
