"""`single`'s kernels for 4-bit weights.

Their numbers are multiplied as whole numbers, four at a time (dp4a): the row becomes two digits of
8 bits with a scale for each 32 inputs, which keeps 14 bits of the largest, more than bf16 has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.fused import ROUND
from kernels.gpu.launch import enter
from kernels.gpu.single import angles, finish, read, read_once, rotate, row_of_pair

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
def digit_sums(
    digits,
    steps,
    totals,
    weight,
    scales,
    lows,
    row,
    apart,
    groups,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    INLINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`float_sums` of a 4-bit weight `[outputs, WORDS]` and of a row of digits (int32 here)."""
    CHUNKS: tl.constexpr = BLOCK_IN // 4
    column, chunk = tl.arange(0, BLOCK_IN), tl.arange(0, CHUNKS)
    row = row[:, None]
    base = weight + row * WORDS + column[None, :]
    other = base + apart.to(tl.int64) * WORDS
    first = read_once(base, column[None, :] < WORDS, WHOLE)
    if PAIRS:
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
        if PAIRS:
            if block > 0:
                second = read_once(other + block * BLOCK_IN, inside[None, :], WHOLE)
            whole = products(second, high_even, high_odd, low_even, low_odd, INLINE)
            whole = tl.sum(tl.reshape(whole, [BLOCK_OUT, CHUNKS, 4]), 2).to(tl.float32)
            place += apart.to(tl.int64) * groups
            ups += weighted(
                whole, step, total, scales + place, lows + place, known[None, :], WHOLE, ZEROS
            )
    return tl.sum(sums, 1), tl.sum(ups, 1)


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
    """`float_row_kernel` of a 4-bit weight and a row of digits."""
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.minimum(output, outputs - 1).to(tl.int64)
    result, up = digit_sums(
        digits, steps, totals, weight, scales, lows, row, outputs, groups, WORDS, GROUP, ZEROS,
        BLOCK_OUT, BLOCK_IN, WHOLE, ACTIVATION != "", INLINE, EARLY,
    )  # fmt: skip
    finish(result, up, out, bias, residual, output, outputs, ACTIVATION, BIAS, ADD)


@triton.jit
def digits_heads_kernel(
    out,
    keys,
    values,
    digits,
    steps,
    totals,
    weight,
    scales,
    lows,
    bias,
    positions,
    slots,
    cosine,
    sine,
    growth,
    apart,
    groups,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROWS: tl.constexpr,
    INLINE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`float_heads_kernel` of a 4-bit weight and a row of digits."""
    pair = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = row_of_pair(pair, QUERY_HEADS, KV_HEADS, DIM)
    slot, cos, sin, factor = angles(row, positions, slots, cosine, sine, growth, DIM, GROWS)
    first, second = digit_sums(
        digits, steps, totals, weight, scales, lows, row.to(tl.int64), apart, groups, WORDS, GROUP,
        ZEROS, BLOCK_OUT, BLOCK_IN, WHOLE, True, INLINE, EARLY,
    )  # fmt: skip
    rotate(
        first, second, out, keys, values, bias, pair, row, slot, cos, sin, factor, QUERY_HEADS,
        KV_HEADS, DIM, BIAS,
    )  # fmt: skip
