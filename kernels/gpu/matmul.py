"""`x @ weight.T` for weights of 16, 8 and 4 bits.

The weight is the left operand: its outputs fill the matrix unit's fixed side of 64, the step's
rows its free one, so that few rows waste nothing and weights that are unpacked in registers are
used from there (the exchange of operands of Machete, Neural Magic 2024). For few rows the inputs
are split among programs (split-K); the last one to arrive adds all parts in order, so the sum never
depends on who came first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import Config

Format = Literal["float", "int8", "group8", "group4"]
# A block of 4-bit weights: 16 words whose nibble i is input 16 i + word.
WORD_BLOCK = 128
WANTED_PROGRAMS = 512
MAX_SPLITS = 16
MAX_FEW = 16


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
    rows,
    outputs,
    inputs,
    stride,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of outputs x rows, over one share of the inputs.

    `stride` is elements (words with 4 bits) of a weight's row.
    """
    block_out, block_row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    output = block_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_out, in_rows = output < outputs, row < rows
    source = x + row.to(tl.int64)[None, :] * inputs
    blocks = tl.cdiv(inputs, BLOCK_IN)
    share = tl.cdiv(blocks, SPLITS)
    first, last = split * share, tl.minimum(blocks, (split + 1) * share)
    base = weight + output.to(tl.int64)[:, None] * stride

    if FORMAT == "int8":
        sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.int32)
    else:
        sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for block in range(first, last):
        if FORMAT == "group4":
            words = tl.load(
                base + block * 16 + tl.arange(0, 16)[None, :], mask=in_out[:, None], other=0
            )
            for part in tl.static_range(8):
                k = block * BLOCK_IN + part * 16 + tl.arange(0, 16)
                group = (block * BLOCK_IN + part * 16) // GROUP * outputs
                factor = tl.load(scales + group + output, mask=in_out, other=0.0).to(tl.float32)
                low = tl.load(lows + group + output, mask=in_out, other=0.0).to(tl.float32)
                numbers = ((words >> (part * 4)) & 15).to(tl.float32)
                w = (numbers * factor[:, None] + low[:, None]).to(x.dtype.element_ty)
                inside = (k < inputs)[:, None] & in_rows[None, :]
                values = tl.load(source + k[:, None], mask=inside, other=0.0)
                sums = tl.dot(w, values, sums, input_precision=PRECISION)
        else:
            k = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
            in_k = k < inputs
            w = tl.load(base + k[None, :], mask=in_out[:, None] & in_k[None, :], other=0)
            inside = in_k[:, None] & in_rows[None, :]
            values = tl.load(source + k[:, None], mask=inside, other=0)
            if FORMAT == "group8":
                group = block * BLOCK_IN // GROUP * outputs
                factor = tl.load(scales + group + output, mask=in_out, other=0.0).to(tl.float32)
                low = tl.load(lows + group + output, mask=in_out, other=0.0).to(tl.float32)
                w = (w.to(tl.float32) * factor[:, None] + low[:, None]).to(x.dtype.element_ty)
            if FORMAT == "int8":
                sums = tl.dot(w, values, sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(w, values, sums, input_precision=PRECISION)

    if FORMAT == "int8":
        factor = tl.load(scales + output, mask=in_out, other=0.0)
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

    @property
    def few(self) -> bool:
        """Whether it is bound by reading the weight. One form serves all in the invariant mode."""
        return self.rows <= MAX_FEW and not self.invariant

    @property
    def block_out(self) -> int:
        """Outputs of a tile."""
        return 64 if self.few or self.dtype == torch.float32 else 128

    @property
    def block_rows(self) -> int:
        """Rows of a tile."""
        if self.few:
            return 16
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
        return 64 if self.hopper and self.dtype != torch.float32 else 32

    @property
    def splits(self) -> int:
        """Programs that share a tile's inputs."""
        if not self.few:
            return 1
        blocks = -(-self.inputs // self.block_in)
        wanted = WANTED_PROGRAMS // -(-self.outputs // self.block_out)
        return 1 << (max(1, min(wanted, blocks // 4, MAX_SPLITS)).bit_length() - 1)

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
                "FORMAT": self.format,
                "GROUP": self.group,
                "BLOCK_OUT": self.block_out,
                "BLOCK_ROWS": self.block_rows,
                "BLOCK_IN": self.block_in,
                "SPLITS": self.splits,
                "BIAS": self.bias,
                "PRECISION": "ieee" if wide else "tf32",
            },
            warps=4 if self.block_out == 64 else 8,
            stages=2 if wide else 4 if self.few else 3,
        )
