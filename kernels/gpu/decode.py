"""A decode's attention in one launch: rotation, the cache's write, attention, the splits' merge.

Each program takes all query heads of one key/value head of one token, for a share of its
context. It rotates the queries itself; the newest key and value, which the first share has, come
from the projection, and go to the cache beside. Where a context is shared, whoever ends last
merges the parts, in order of position. A short context is shared by few, whatever the grid has:
how many is found from its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.attention import MAX_PARTIAL_BYTES, MAX_SPLITS, WANTED_PROGRAMS
from kernels.gpu.fused import write_vector
from kernels.gpu.launch import Config, enter, power_of_two
from kernels.ops import Heads

# Keys that are worth a program of their own.
LEAST_SHARE = 128
# Parts that are merged at once.
MERGED = 8


@triton.jit
def rotated(first, second, norm, dims, inside, cosine, sine, eps, DIM: tl.constexpr,
            NORMS: tl.constexpr):  # fmt: skip
    """Vectors `[rows, DIM / 2]` in two halves, normalized if NORMS, and rotated; fp32."""
    if NORMS:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM
        factor = tl.rsqrt(mean + eps)[:, None]
        low = tl.load(norm + dims, mask=inside, other=0.0)[None, :]
        high = tl.load(norm + DIM // 2 + dims, mask=inside, other=0.0)[None, :]
        first, second = first * factor * low, second * factor * high
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit(do_not_specialize=["window", "table_width"])
def decode_kernel(
    out,
    partial,
    partial_sums,
    arrived,
    qkv,
    keys,
    values,
    key_scales,
    value_scales,
    query_starts,
    context_lengths,
    slots,
    page_table,
    cosine,
    sine,
    query_norm,
    key_norm,
    eps,
    scale,
    window,
    table_width,
    PAGE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    MERGED: tl.constexpr,
    NORMS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token's queries of one key/value head against one share of its keys.

    `scale` includes log2(e); `window` of 0 sees everything (WINDOWED is then false).
    """
    enter(EARLY)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = QUERY_HEADS // KV_HEADS
    HALF: tl.constexpr = DIM // 2
    WIDTH: tl.constexpr = (QUERY_HEADS + 2 * KV_HEADS) * DIM
    position = tl.load(context_lengths + row) - 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.maximum(tl.cdiv(tl.cdiv(position - begin, SPLITS), BLOCK_N) * BLOCK_N, LEAST)
    shares = tl.maximum(tl.cdiv(position - begin, share), 1)
    live = tl.load(query_starts + row) < tl.load(query_starts + row + 1)
    if live & (split < shares):
        token = row.to(tl.int64)
        source = qkv + token * WIDTH
        half, dims = tl.arange(0, HALF), tl.arange(0, DIM)
        always = half < HALF
        member = tl.arange(0, BLOCK_M)
        ours = member < GROUP
        place = (head * GROUP + member)[:, None] * DIM
        angle = position.to(tl.int64) * HALF + half
        cos, sin = tl.load(cosine + angle)[None, :], tl.load(sine + angle)[None, :]
        first = tl.load(source + place + half[None, :], mask=ours[:, None], other=0.0)
        second = tl.load(source + place + HALF + half[None, :], mask=ours[:, None], other=0.0)
        first, second = rotated(
            first.to(tl.float32), second.to(tl.float32), query_norm, half, always, cos, sin, eps,
            DIM, NORMS,
        )  # fmt: skip
        kind = qkv.dtype.element_ty
        q_first, q_second = first.to(kind), second.to(kind)

        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, DIM], tl.float32)
        if split == 0:
            newest = source + (QUERY_HEADS + head) * DIM
            low = tl.load(newest + half)[None, :].to(tl.float32)
            high = tl.load(newest + HALF + half)[None, :].to(tl.float32)
            low, high = rotated(low, high, key_norm, half, always, cos, sin, eps, DIM, NORMS)
            low, high = tl.reshape(low, [HALF]), tl.reshape(high, [HALF])
            own = tl.load(slots + row).to(tl.int64)
            write_vector(keys, key_scales, own, head, low, high, half, KV_HEADS, DIM, QUANTIZED)
            low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
            products = q_first.to(tl.float32) * low[None, :]
            products += q_second.to(tl.float32) * high[None, :]
            best = tl.sum(products, 1) * scale
            total = tl.full([BLOCK_M], 1.0, tl.float32)
            newest += KV_HEADS * DIM
            low = tl.load(newest + half).to(tl.float32)
            high = tl.load(newest + HALF + half).to(tl.float32)
            write_vector(values, value_scales, own, head, low, high, half, KV_HEADS, DIM, QUANTIZED)
            mixed += tl.load(newest + dims).to(tl.float32)[None, :]

        low_key = begin + split * share
        high_key = tl.minimum(position, low_key + share)
        table = page_table + token * table_width
        offsets = tl.arange(0, BLOCK_N)
        for key in range(low_key, high_key, BLOCK_N):
            at = key + offsets
            inside = at < high_key
            page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
            slot = (page * PAGE + at % PAGE) * KV_HEADS + head
            where = keys + slot[None, :] * DIM + half[:, None]
            k_first = tl.load(where, mask=inside[None, :], other=0.0)
            k_second = tl.load(where + HALF, mask=inside[None, :], other=0.0)
            if QUANTIZED:
                k_first, k_second = k_first.to(kind), k_second.to(kind)
            scores = tl.dot(q_first, k_first, input_precision=PRECISION)
            scores = tl.dot(q_second, k_second, scores, input_precision=PRECISION) * scale
            if QUANTIZED:
                scores *= tl.load(key_scales + slot, mask=inside, other=0.0)[None, :]
            visible = inside
            if WINDOWED:
                visible = inside & (at > position - window)
            scores = tl.where(visible[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            # A share whose first keys lie before the window keeps -inf; weights must be 0, not NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(best - base)
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(
                values + slot[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0
            )
            if QUANTIZED:
                weights *= tl.load(value_scales + slot, mask=inside, other=0.0)[None, :]
                v = v.to(kind)
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
            best = higher

        result = out + (token * QUERY_HEADS + head * GROUP + member)[:, None] * DIM + dims[None, :]
        ours_2d = ours[:, None] & (dims[None, :] < DIM)
        if SPLITS == 1 or shares == 1:
            tl.store(result, (mixed / total[:, None]).to(out.dtype.element_ty), mask=ours_2d)
        else:
            part = (token * KV_HEADS + head) * SPLITS * GROUP + member
            mine = part + split * GROUP
            tl.store(partial + mine[:, None] * DIM + dims[None, :], mixed, mask=ours_2d)
            tl.store(partial_sums + mine * 2, best, mask=ours)
            tl.store(partial_sums + mine * 2 + 1, total, mask=ours)
            # Everybody's part is in memory before anybody counts it.
            tl.debug_barrier()
            counter = arrived + token * KV_HEADS + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == shares - 1:
                merge_parts(
                    result, partial, partial_sums, part, shares, ours, dims, GROUP, DIM, BLOCK_M,
                    SPLITS, MERGED,
                )  # fmt: skip
                tl.store(counter, 0)


@triton.jit
def merge_parts(result, partial, partial_sums, part, shares, ours, dims, GROUP: tl.constexpr,
                DIM: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
                MERGED: tl.constexpr):  # fmt: skip
    """Add the shares of a head's queries, some at a time."""
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, DIM], tl.float32)
    some = tl.arange(0, MERGED)
    for start in range(0, shares, MERGED):
        inside = ((start + some) < shares)[:, None] & ours[None, :]
        at = part[None, :] + (start + some)[:, None] * GROUP
        bests = tl.load(
            partial_sums + at * 2, mask=inside, other=float("-inf"), cache_modifier=".cg"
        )
        sums = tl.load(partial_sums + at * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(best, tl.max(bests, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(bests - base[None, :])
        shrink = tl.exp2(best - base)
        parts = tl.load(
            partial + at[:, :, None] * DIM + dims[None, None, :],
            mask=inside[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        mixed = mixed * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        total = total * shrink + tl.sum(sums * weights, 0)
        best = higher
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(result, (mixed / total[:, None]).to(result.dtype.element_ty), mask=ours[:, None])


@dataclass(frozen=True)
class DecodeShape:
    """What a launch for up to `rows` tokens is compiled for; `page` is tokens a page."""

    heads: Heads
    page: int
    dtype: torch.dtype
    quantized: bool
    windowed: bool
    norms: bool
    rows: int

    @staticmethod
    def fits(heads: Heads) -> bool:
        """Whether halves of these heads are what matrix units take."""
        return heads.dim >= 32 and heads.dim == power_of_two(heads.dim)

    @property
    def splits(self) -> int:
        """Programs that share a long context: as many as keep the device busy."""
        wanted = WANTED_PROGRAMS // (self.rows * self.heads.kv)
        width = self.rows * self.heads.query * self.heads.dim * 4
        most = min(MAX_SPLITS, MAX_PARTIAL_BYTES // width)
        return 1 << (max(1, min(wanted, most)).bit_length() - 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens, heads and shares."""
        return (self.rows, self.heads.kv, self.splits)

    def config(self) -> Config:
        """How it is compiled."""
        heads, wide = self.heads, self.dtype == torch.float32
        many = self.splits > 4
        narrow = not many and heads.dim <= 128 and not self.quantized
        constants: dict[str, Any] = {
            "PAGE": self.page,
            "QUERY_HEADS": heads.query,
            "KV_HEADS": heads.kv,
            "DIM": heads.dim,
            "BLOCK_M": max(16, power_of_two(heads.query // heads.kv)),
            "BLOCK_N": 32 if heads.dim > 128 or wide else 128 if many else 64,
            "SPLITS": self.splits,
            "LEAST": LEAST_SHARE,
            "MERGED": MERGED,
            "NORMS": self.norms,
            "QUANTIZED": self.quantized,
            "WINDOWED": self.windowed,
            "PRECISION": "ieee" if wide else "tf32",
        }
        stages = 1 if wide else 2 if heads.dim > 128 else 3
        return Config(decode_kernel, constants, warps=2 if narrow else 4, stages=stages)

    def workspace(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where shares leave their parts: fp32 `[rows, kv heads, splits, group, dim]`, and the
        maximum and sum of each."""
        parts = self.rows * self.heads.query * self.splits if self.splits > 1 else 1
        return (
            torch.empty(parts * self.heads.dim, dtype=torch.float32, device=device),
            torch.empty(parts * 2, dtype=torch.float32, device=device),
        )
