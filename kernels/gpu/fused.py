"""What lies between the matmuls of a layer: norms, rotation and the cache's writes, gates, gathers.

Sums and rotations are in fp32, whatever the activations are stored in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import ops
from kernels.gpu.launch import announce, enter, wait

# Adding and subtracting 1.5 * 2^23 rounds an fp32 number to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)
SWIGLU_SLOPE, SWIGLU_LIMIT = tl.constexpr(ops.SWIGLU_SLOPE), tl.constexpr(ops.SWIGLU_LIMIT)


@triton.jit
def token_of(row, token_ids, last_ids, slots, fed):
    """A row's token: the first `fed` rows take the one last drawn at their slot."""
    token = tl.load(token_ids + row).to(tl.int64)
    if row < tl.load(fed):
        token = tl.load(last_ids + tl.load(slots + row))
    return token


@triton.jit
def place_of(token, first, rows, scale):
    """Where a token lies in a table of `rows` tokens from `first` on, and what its values are to be
    multiplied with: `scale`, or 0 if it lies elsewhere."""
    index = tl.minimum(tl.maximum(token - first, 0), rows - 1)
    return index, tl.where(index == token - first, scale, 0.0)


@triton.jit
def embed_kernel(
    out,
    table,
    token_ids,
    last_ids,
    slots,
    fed,
    scale,
    rows,
    first,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows of a float table."""
    enter(EARLY)
    row = tl.program_id(0)
    token, scale = place_of(token_of(row, token_ids, last_ids, slots, fed), first, rows, scale)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(table + token * WIDTH + columns, mask=inside).to(tl.float32) * scale
    place = row.to(tl.int64) * WIDTH + columns
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def value_of(number, factor, low, ZEROS: tl.constexpr):
    """What a number of a group stands for; see `GpuWeight`."""
    return (number + 128.0 + low) * factor if ZEROS else number * factor + low


@triton.jit
def float4_of(nibble):
    """The number of two exponent bits and one mantissa bit that a nibble is, int16: these bits of
    an fp16 number, which is then too small by 2^14, and its sign."""
    half = ((nibble & 7) << 9) | ((nibble & 8) << 12)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def embed_numbers_kernel(
    out,
    table,
    scales,
    lows,
    token_ids,
    last_ids,
    slots,
    fed,
    scale,
    rows,
    first,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows of a table of whole numbers, in any of `matmul.Format`."""
    enter(EARLY)
    row = tl.program_id(0)
    token, scale = place_of(token_of(row, token_ids, last_ids, slots, fed), first, rows, scale)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    if FORMAT == "group4" or FORMAT == "float4":
        word = columns // 32 * 4 + columns % 8 // 2
        words = tl.load(table + token * STRIDE + word, mask=inside, other=0)
        shift = columns % 32 // 8 * 4 + columns % 2 * 16
        nibble = (words >> shift) & 15
        values = float4_of(nibble.to(tl.int16)) if FORMAT == "float4" else nibble.to(tl.float32)
    else:
        values = tl.load(table + token * STRIDE + columns, mask=inside, other=0).to(tl.float32)
    if FORMAT == "int8":
        values *= tl.load(scales + token)
    else:
        place = token * GROUPS + columns // GROUP
        factor = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        if FORMAT == "float4":
            values *= factor
        else:
            low = tl.load(lows + place, mask=inside, other=0.0).to(tl.float32)
            values = value_of(values, factor, low, ZEROS)
    place = row.to(tl.int64) * WIDTH + columns
    tl.store(out + place, (values * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(
    out,
    total,
    x,
    residual,
    weight,
    eps,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """RMS norm of a row, of its scaled sum with the residual if ADD."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    factors = tl.load(weight + columns, mask=inside, other=0.0)
    enter(EARLY)
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        values *= scale
        tl.store(total + row + columns, values.to(total.dtype.element_ty), mask=inside)
    mean = tl.sum(values * values, 0) / WIDTH
    result = values * tl.rsqrt(mean + eps) * factors
    tl.store(out + row + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(out, scales, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """A row of activations in int8 under one scale (BitNet's arithmetic, arXiv 2402.17764)."""
    enter(EARLY)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    place = row.to(tl.int64) * WIDTH + columns
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = 127.0 / tl.maximum(tl.max(tl.abs(values), 0), 1e-5)
    tl.store(out + place, ((values * factor + ROUND) - ROUND).to(tl.int8), mask=inside)
    tl.store(scales + row, 1.0 / factor)


@triton.jit
def whole_steps(x, most):
    """A cache's vector in steps of a 127th of its largest, `most`, as whole numbers."""
    inverse = tl.where(most > 0.0, 127.0 / tl.maximum(most, 1e-30), 0.0)
    return (x * inverse + ROUND) - ROUND


@triton.jit
def write_vectors(
    cache, scales, slot, index, mine, first, second, dims, KV_HEADS, DIM, QUANTIZED: tl.constexpr
):
    """The two halves of some heads `[heads, dims]` to their places in the cache, with a scale of
    its own for each if QUANTIZED; only those that are `mine`."""
    HALF: tl.constexpr = DIM // 2
    place = cache + ((slot * KV_HEADS + index) * DIM)[:, None] + dims[None, :]
    inside = mine[:, None] & (dims < HALF)[None, :]
    if QUANTIZED:
        most = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        tl.store(scales + slot * KV_HEADS + index, most / 127.0, mask=mine)
        first, second = whole_steps(first, most[:, None]), whole_steps(second, most[:, None])
    tl.store(place, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(place + HALF, second.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def rope_write_kernel(
    out,
    keys,
    values,
    key_scales,
    value_scales,
    qkv,
    positions,
    slots,
    cosine,
    sine,
    query_norm,
    key_norm,
    value_norm,
    growth,
    squares,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    GROWS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    SQUARES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """HEADS heads of one token: a query is normalized, rotated and written out; a key is also, to
    the cache; a value goes there as it is, or normalized. Norms are each head's own, or over so
    many WHOLE_QUERIES and WHOLE_KEYS, whose sums of squares are given."""
    announce(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    HALF: tl.constexpr = DIM // 2
    ALL: tl.constexpr = QUERY_HEADS + 2 * KV_HEADS
    dims = tl.arange(0, BLOCK)
    is_query = head < QUERY_HEADS
    is_key = (head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS)
    is_value = (head >= QUERY_HEADS + KV_HEADS) & (head < ALL)
    in_dim = dims < HALF
    inside = (head < ALL)[:, None] & in_dim[None, :]
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cosine + position * HALF + dims, mask=in_dim, other=0.0)[None, :]
    sin = tl.load(sine + position * HALF + dims, mask=in_dim, other=0.0)[None, :]
    if WHOLE_QUERIES > 0:
        own = tl.where(is_query, head, head - QUERY_HEADS)[:, None] * DIM + dims[None, :]
        of_query, of_key = is_query[:, None] & in_dim[None, :], is_key[:, None] & in_dim[None, :]
        first_norm = tl.load(query_norm + own, mask=of_query, other=0.0)
        first_norm += tl.load(key_norm + own, mask=of_key, other=0.0)
        second_norm = tl.load(query_norm + own + HALF, mask=of_query, other=0.0)
        second_norm += tl.load(key_norm + own + HALF, mask=of_key, other=0.0)
    elif NORMS:
        first_norm = norm_of(query_norm, key_norm, is_query, dims, in_dim)
        second_norm = norm_of(query_norm, key_norm, is_query, HALF + dims, in_dim)
    wait(EARLY)
    place = qkv + (row * ALL + head)[:, None] * DIM + dims[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    own_first, own_second = first, second
    if WHOLE_QUERIES > 0:
        pair = tl.arange(0, SQUARES)
        pairs = squares + row * 2 * WHOLE_QUERIES + 2 * pair
        query_squares = tl.load(pairs, mask=pair < WHOLE_QUERIES, other=0.0)
        key_squares = tl.load(pairs + 1, mask=pair < WHOLE_QUERIES, other=0.0)
        query_factor = tl.rsqrt(tl.sum(query_squares, 0) / (WHOLE_QUERIES * DIM) + eps)
        key_factor = tl.rsqrt(tl.sum(key_squares, 0) / (WHOLE_KEYS * DIM) + eps)
        factor = tl.where(is_query, query_factor, key_factor)[:, None]
        first, second = first * factor * first_norm, second * factor * second_norm
    elif NORMS:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM
        factor = tl.rsqrt(mean + eps)[:, None]
        if VALUE_NORM:
            by_first = tl.load(value_norm + dims, mask=in_dim, other=0.0)[None, :]
            by_second = tl.load(value_norm + HALF + dims, mask=in_dim, other=0.0)[None, :]
            own_first, own_second = first * factor * by_first, second * factor * by_second
        first, second = first * factor * first_norm, second * factor * second_norm
    write_vectors(
        values, value_scales, slot, head - QUERY_HEADS - KV_HEADS, is_value, own_first, own_second,
        dims, KV_HEADS, DIM, QUANTIZED,
    )  # fmt: skip
    low = first * cos - second * sin
    high = second * cos + first * sin
    write_vectors(
        keys, key_scales, slot, head - QUERY_HEADS, is_key, low, high, dims, KV_HEADS, DIM,
        QUANTIZED,
    )  # fmt: skip
    if GROWS:
        factor = tl.load(growth + position)
        low, high = low * factor, high * factor
    place = out + (row * QUERY_HEADS + head)[:, None] * DIM + dims[None, :]
    inside = is_query[:, None] & in_dim[None, :]
    tl.store(place, low.to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def head_squares_kernel(
    out,
    qkv,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A query head's sum of squares, and that of its key head if it is the first to share it."""
    enter(EARLY)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    SHARE: tl.constexpr = QUERY_HEADS // KV_HEADS
    dims = tl.arange(0, BLOCK)
    inside = dims < DIM
    heads = qkv + row * (QUERY_HEADS + 2 * KV_HEADS) * DIM + dims
    query = tl.load(heads + head * DIM, mask=inside, other=0.0).to(tl.float32)
    counted = inside & (head % SHARE == 0) & KEYS
    key = tl.load(heads + (QUERY_HEADS + head // SHARE) * DIM, mask=counted, other=0.0)
    key = key.to(tl.float32)
    place = out + (row * QUERY_HEADS + head) * 2
    tl.store(place, tl.sum(query * query, 0))
    tl.store(place + 1, tl.sum(key * key, 0))


@triton.jit
def norm_of(query_norm, key_norm, is_query, dims, in_dim):
    """The norm's weights of each head, `[heads, dims]`."""
    of_query = tl.load(query_norm + dims, mask=in_dim, other=0.0)[None, :]
    of_key = tl.load(key_norm + dims, mask=in_dim, other=0.0)[None, :]
    return tl.where(is_query[:, None], of_query, of_key)


@triton.jit
def active(gate, ACTIVATION: tl.constexpr):
    """An activation function's value."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    if ACTIVATION == "relu2":
        positive = tl.maximum(gate, 0.0)
        return positive * positive
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    # tanh by way of exp of what is never positive, so that nothing overflows.
    small = tl.exp(-2.0 * tl.abs(inner))
    tanh = (1.0 - small) / (1.0 + small)
    return 0.5 * gate * (1.0 + tl.where(inner < 0.0, -tanh, tanh))


@triton.jit
def gate_of(gate, up, ACTIVATION: tl.constexpr):
    """What a gate makes of `up`, as `Ops.gated`."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, SWIGLU_LIMIT)
        up = tl.minimum(tl.maximum(up, -SWIGLU_LIMIT), SWIGLU_LIMIT)
        value = gate / (1.0 + tl.exp(-(gate * SWIGLU_SLOPE))) * (up + 1.0)
    else:
        value = active(gate, ACTIVATION) * up
    return value


@triton.jit
def gated_kernel(
    out, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, EARLY: tl.constexpr
):
    """`activation(gate) * up` of a row whose halves are the two."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate_of(gate, up, ACTIVATION)
    tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def select_kernel(
    out, x, sample_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """The rows whose logits the step needs."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    source = tl.load(sample_rows + row).to(tl.int64) * WIDTH
    enter(EARLY)
    values = tl.load(x + source + columns, mask=inside)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, values, mask=inside)
