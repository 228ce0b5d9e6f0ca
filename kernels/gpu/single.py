"""`x @ weight.T` of one row, with what stands before and behind it in a layer.

Such a step is bound by reading weights, and by the gaps between kernels. So there are few kernels:
a norm comes with the matmul behind it; a gate, the residual's addition, and the rotation of heads
with the cache's writes come with the one before. And there are no gaps: each reads its first
weights while the kernel before it still runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.fused import gate_of
from kernels.gpu.launch import enter


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
def row_of_pair(pair, QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """The weight's row of a pair's first dim; its second lies half a head behind it."""
    HALF: tl.constexpr = DIM // 2
    pair = tl.minimum(pair, (QUERY_HEADS + 2 * KV_HEADS) * HALF - 1)
    return pair // HALF * DIM + pair % HALF


@triton.jit
def angles(row, positions, slots, cosine, sine, growth, DIM: tl.constexpr, GROWS: tl.constexpr):
    """What a rotation needs that no kernel of the step writes: the token's slot, its cosine and
    sine for each row's pair, and what its queries are multiplied with."""
    HALF: tl.constexpr = DIM // 2
    position = tl.load(positions).to(tl.int64)
    place = position * HALF + row % DIM
    factor = tl.load(growth + position) if GROWS else 1.0
    return tl.load(slots), tl.load(cosine + place), tl.load(sine + place), factor


@triton.jit
def rotate(first, second, out, keys, values, bias, pair, row, slot, cos, sin, factor,
           QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
           BIAS: tl.constexpr):  # fmt: skip
    """What comes behind the sums of heads: bias, rotation; then queries are stored, and keys and
    values in the token's slot of the cache."""
    HALF: tl.constexpr = DIM // 2
    if BIAS:
        first += tl.load(bias + row)
        second += tl.load(bias + row + HALF)
    head = row // DIM
    inside = pair < (QUERY_HEADS + 2 * KV_HEADS) * HALF
    is_query = inside & (head < QUERY_HEADS)
    is_key = inside & (head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS)
    is_value = inside & (head >= QUERY_HEADS + KV_HEADS)
    place = slot.to(tl.int64) * KV_HEADS * DIM + row - (QUERY_HEADS + KV_HEADS) * DIM
    tl.store(values + place, first.to(values.dtype.element_ty), mask=is_value)
    tl.store(values + place + HALF, second.to(values.dtype.element_ty), mask=is_value)
    low = first * cos - second * sin
    high = second * cos + first * sin
    place += KV_HEADS * DIM
    tl.store(keys + place, low.to(keys.dtype.element_ty), mask=is_key)
    tl.store(keys + place + HALF, high.to(keys.dtype.element_ty), mask=is_key)
    tl.store(out + row, (low * factor).to(out.dtype.element_ty), mask=is_query)
    tl.store(out + row + HALF, (high * factor).to(out.dtype.element_ty), mask=is_query)


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
def float_sums(
    x,
    weight,
    row,
    apart,
    norm,
    eps,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    NORM: tl.constexpr,
    PAIRS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x times some rows of a float weight `[outputs, INPUTS]` and, if PAIRS, times those that lie
    `apart` rows behind them, both fp32 `[BLOCK_OUT]`. With NORM the row is x's RMS norm. What is
    read before the wait is the first weights."""
    column = tl.arange(0, BLOCK_IN)
    base = weight + row[:, None] * INPUTS + column[None, :]
    other = base + apart.to(tl.int64) * INPUTS
    first = read_once(base, column[None, :] < INPUTS, WHOLE)
    if PAIRS:
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
        if PAIRS:
            if block > 0:
                second = read_once(other + block * BLOCK_IN, inside[None, :], WHOLE)
            ups += second.to(tl.float32) * values[None, :]
    result, up = tl.sum(sums, 1), tl.sum(ups, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)
        result, up = result * factor, up * factor
    return result, up


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
    row = tl.minimum(output, outputs - 1).to(tl.int64)
    result, up = float_sums(
        x, weight, row, outputs, norm, eps, INPUTS, BLOCK_OUT, BLOCK_IN, WHOLE, NORM,
        ACTIVATION != "", EARLY,
    )  # fmt: skip
    finish(result, up, out, bias, residual, output, outputs, ACTIVATION, BIAS, ADD)


@triton.jit
def float_heads_kernel(
    out,
    keys,
    values,
    x,
    weight,
    bias,
    norm,
    eps,
    positions,
    slots,
    cosine,
    sine,
    growth,
    apart,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some pairs of dims of a float weight that makes queries, keys and values: see `rotate`."""
    pair = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = row_of_pair(pair, QUERY_HEADS, KV_HEADS, DIM)
    slot, cos, sin, factor = angles(row, positions, slots, cosine, sine, growth, DIM, GROWS)
    first, second = float_sums(
        x,
        weight,
        row.to(tl.int64),
        apart,
        norm,
        eps,
        INPUTS,
        BLOCK_OUT,
        BLOCK_IN,
        WHOLE,
        NORM,
        True,
        EARLY,
    )
    rotate(
        first, second, out, keys, values, bias, pair, row, slot, cos, sin, factor, QUERY_HEADS,
        KV_HEADS, DIM, BIAS,
    )  # fmt: skip
