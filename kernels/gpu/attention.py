"""Attention over the paged cache, for any mixture of prefill chunks and decodes in one launch.

A program takes a block of queries: all query heads of one key/value head, for one token (decode) or
several, so that the matrix units have rows to work on. The grid depends on the largest batch only,
so a launch can be captured; blocks find their sequence by bisection and leave when there is none.
Long contexts are split among programs, whose parts a second kernel merges. After "The Anatomy of a
Triton Attention Kernel" (arXiv 2511.11581) and FlashDecoding (Dao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import Config, announce, power_of_two, wait
from kernels.ops import Heads

# Programs that keep every multiprocessor of a large GPU (132) busy, several times over.
WANTED_PROGRAMS = 512
MAX_SPLITS = 32
# Query heads of a program that share latents.
MAX_GROUP = 32
# More than these leave so little to each that it is best read at once.
MANY_SPLITS = 4
# In the batch-invariant mode every step splits alike, whatever it holds.
INVARIANT_SPLITS = 8
# Bytes that the parts of a split launch may take.
MAX_PARTIAL_BYTES = 256 << 20
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    best,
    total,
    mixed,
    q,
    q_tail,
    key,
    high_key,
    position,
    window,
    table,
    keys,
    values,
    key_scales,
    value_scales,
    head,
    scale,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LATENT: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TAIL_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUANTIZED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running maximum, sum and mix of a block of queries `[BLOCK_M, DIM_PADDED]` after a tile
    of keys from `key` on; without MASKED every query sees all of them. With LATENT the first so
    many values of a key are its value, and `q_tail` meets those behind them."""
    at = key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, DIM_PADDED)
    in_dim = dims < (LATENT if LATENT else DIM)
    inside = at < high_key if MASKED else at >= 0
    page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
    slot = (page * PAGE + at % PAGE) * KV_HEADS + head
    k = tl.load(
        keys + slot[None, :] * DIM + dims[:, None],
        mask=inside[None, :] & in_dim[:, None],
        other=0.0,
    )
    if QUANTIZED:
        k = k.to(q.dtype)
    scores = tl.dot(q, k, input_precision=PRECISION)
    if LATENT:
        behind = tl.arange(0, TAIL_PADDED)
        tail = tl.load(
            keys + slot[None, :] * DIM + LATENT + behind[:, None],
            mask=inside[None, :] & (behind < DIM - LATENT)[:, None],
            other=0.0,
        )
        if QUANTIZED:
            tail = tail.to(q.dtype)
        scores = tl.dot(q_tail, tail, scores, input_precision=PRECISION)
    scores *= scale
    if QUANTIZED:
        scores *= tl.load(key_scales + slot, mask=inside, other=0.0)[None, :]
    if MASKED:
        visible = inside[None, :] & (at[None, :] <= position[:, None])
        if WINDOWED:
            visible &= at[None, :] > position[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf; its weights must be 0, not NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(weights, 1)
    if LATENT:
        v = tl.trans(k)
    else:
        v = tl.load(
            values + slot[:, None] * DIM + dims[None, :],
            mask=inside[:, None] & in_dim[None, :],
            other=0.0,
        )
    if QUANTIZED:
        weights *= tl.load(value_scales + slot, mask=inside, other=0.0)[None, :]
        v = v.to(q.dtype)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
    return higher, total, mixed


@triton.jit
def with_sink(best, total, sink):
    """A running maximum and sum after one more key without a value, and what its mix shrinks by."""
    higher = tl.maximum(best, sink)
    shrink = tl.exp2(best - higher)
    return higher, total * shrink + tl.exp2(sink - higher), shrink


@triton.jit(do_not_specialize=["window", "sequences", "table_width"])
def attention_kernel(
    out,
    partial,
    partial_sums,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    query_starts,
    context_lengths,
    page_table,
    sinks,
    scale,
    window,
    sequences,
    table_width,
    PAGE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LATENT: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TAIL_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    DECODE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One block of queries against one split of its sequence's keys.

    `scale` includes log2(e); `window` of 0 sees everything (WINDOWED is then false).
    """
    announce(EARLY)
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DECODE:
        sequence = block
        local = 0
    else:
        # Sequence s owns the blocks from starts[s] // TOKENS + s on.
        low, high = sequences * 0, sequences
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(query_starts + middle) // TOKENS + middle <= block:
                low = middle
            else:
                high = middle
        sequence = low
        local = block - (tl.load(query_starts + sequence) // TOKENS + sequence)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    first = local * TOKENS
    if first < count:
        context = tl.load(context_lengths + sequence)
        rows = tl.arange(0, BLOCK_M)
        token = first + rows // GROUP
        query_head = head * GROUP + rows % GROUP
        live = (rows < TOKENS * GROUP) & (token < count)
        position = context - count + token
        dims = tl.arange(0, DIM_PADDED)
        in_dim = dims < (LATENT if LATENT else DIM)
        place = ((start + token).to(tl.int64) * QUERY_HEADS + query_head) * DIM
        end = context - count + tl.minimum(first + TOKENS, count)
        begin = 0
        if WINDOWED:
            begin = tl.maximum(context - count + first - window + 1, 0) // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK_N) * BLOCK_N
        low_key = begin + split * share
        high_key = tl.minimum(end, low_key + share)
        table = page_table + sequence.to(tl.int64) * table_width
        wait(EARLY)
        q = tl.load(
            queries + place[:, None] + dims[None, :],
            mask=live[:, None] & in_dim[None, :],
            other=0.0,
        )
        q_tail = q
        if LATENT:
            # Several blocks of queries may share the latents.
            head = 0
            behind = tl.arange(0, TAIL_PADDED)
            q_tail = tl.load(
                queries + place[:, None] + LATENT + behind[None, :],
                mask=live[:, None] & (behind < DIM - LATENT)[None, :],
                other=0.0,
            )
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
        # Tiles that every query of the block sees whole need no mask.
        masked_key = low_key
        if not DECODE and not WINDOWED:
            seen = tl.minimum(context - count + first + 1, high_key)
            masked_key += tl.maximum(seen - low_key, 0) // BLOCK_N * BLOCK_N
            for key in range(low_key, masked_key, BLOCK_N):
                best, total, mixed = attend(
                    best, total, mixed, q, q_tail, key, high_key, position, window, table, keys,
                    values, key_scales, value_scales, head, scale, PAGE, KV_HEADS, DIM, LATENT,
                    DIM_PADDED, TAIL_PADDED, BLOCK_N, QUANTIZED, False, False, PRECISION,
                )  # fmt: skip
        for key in range(masked_key, high_key, BLOCK_N):
            best, total, mixed = attend(
                best, total, mixed, q, q_tail, key, high_key, position, window, table, keys,
                values, key_scales, value_scales, head, scale, PAGE, KV_HEADS, DIM, LATENT,
                DIM_PADDED, TAIL_PADDED, BLOCK_N, QUANTIZED, True, WINDOWED, PRECISION,
            )  # fmt: skip

        if SPLITS == 1:
            if SINKS:
                sink = tl.load(sinks + query_head, mask=live, other=0.0) * LOG2_E
                best, total, shrink = with_sink(best, total, sink)
                mixed *= shrink[:, None]
            result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(
                out + place[:, None] + dims[None, :],
                result.to(out.dtype.element_ty),
                mask=live[:, None] & in_dim[None, :],
            )
        else:
            part = ((start + token).to(tl.int64) * QUERY_HEADS + query_head) * SPLITS + split
            tl.store(
                partial + part[:, None] * DIM + dims[None, :],
                mixed,
                mask=live[:, None] & in_dim[None, :],
            )
            tl.store(partial_sums + part * 2, best, mask=live)
            tl.store(partial_sums + part * 2 + 1, total, mask=live)


@triton.jit(do_not_specialize=["sequences"])
def merge_kernel(
    out,
    partial,
    partial_sums,
    query_starts,
    sinks,
    sequences,
    QUERY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LATENT: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the splits of one head of one row, in order of position."""
    announce(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    if row < tl.load(query_starts + sequences):
        wait(EARLY)
        splits = tl.arange(0, SPLITS)
        dims = tl.arange(0, DIM_PADDED)
        in_dim = dims < (LATENT if LATENT else DIM)
        place = row.to(tl.int64) * QUERY_HEADS + head
        best = tl.load(partial_sums + (place * SPLITS + splits) * 2)
        total = tl.load(partial_sums + (place * SPLITS + splits) * 2 + 1)
        most = tl.max(best, 0)
        if SINKS:
            sink = tl.load(sinks + head) * LOG2_E
            most = tl.maximum(most, sink)
        weights = tl.exp2(best - most)
        parts = tl.load(
            partial + (place * SPLITS + splits[:, None]) * DIM + dims[None, :],
            mask=in_dim[None, :],
            other=0.0,
        )
        whole = tl.sum(total * weights, 0)
        if SINKS:
            whole += tl.exp2(sink - most)
        result = tl.sum(parts * weights[:, None], 0) / whole
        tl.store(out + place * DIM + dims, result.to(out.dtype.element_ty), mask=in_dim)


@dataclass(frozen=True)
class AttentionShape:
    """What a launch for up to `rows` token rows of up to `sequences` chunks is compiled for.

    With `decode` every chunk is one token; `page` is tokens a page, `dtype` of the queries.
    `hopper` GPUs multiply 64 rows by the four warps of a group.
    """

    heads: Heads
    page: int
    dtype: torch.dtype
    quantized: bool
    windowed: bool
    rows: int
    sequences: int
    decode: bool
    invariant: bool = False
    hopper: bool = True
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads of a program: those of one key/value head, or some of all that share
        latents, whose sums would be too many registers."""
        group = self.heads.query // self.heads.kv
        if not self.heads.latent:
            return group
        return max(size for size in range(1, MAX_GROUP + 1) if group % size == 0)

    @property
    def groups(self) -> int:
        """Programs for a block of tokens and a split: one for each group of query heads."""
        return self.heads.query // self.group

    @property
    def block_m(self) -> int:
        """Rows of a block: query heads times tokens."""
        least = max(16, power_of_two(self.group))
        # The sums of 64 rows of the widest heads are too many registers.
        small = self.invariant or self.heads.dim > 256
        return least if self.decode else max(least, 32 if small else 64)

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 1 if self.decode else self.block_m // self.group

    @property
    def blocks(self) -> int:
        """Blocks that the fullest batch has."""
        return self.sequences if self.decode else self.rows // self.tokens + self.sequences

    @property
    def splits(self) -> int:
        """Programs that share a context: as many as keep the device busy."""
        if self.invariant:
            return INVARIANT_SPLITS
        wanted = WANTED_PROGRAMS // (self.blocks * self.groups)
        width = self.rows * self.heads.query * self.heads.dim * 4
        most = min(MAX_SPLITS, MAX_PARTIAL_BYTES // width)
        return 1 << (max(1, min(wanted, most)).bit_length() - 1)

    def configs(self) -> tuple[Config, Config | None]:
        """The attention kernel, and the merging one if contexts are split."""
        heads = self.heads
        padded = max(16, power_of_two(heads.latent or heads.dim))
        shared: dict[str, Any] = {
            "QUERY_HEADS": heads.query,
            "DIM": heads.dim,
            "LATENT": heads.latent,
            "DIM_PADDED": padded,
            "SPLITS": self.splits,
            "SINKS": self.sinks,
        }
        wide = self.dtype == torch.float32
        main = Config(
            attention_kernel,
            {
                **shared,
                "PAGE": self.page,
                "KV_HEADS": heads.kv,
                "GROUP": self.group,
                "TAIL_PADDED": max(16, power_of_two(heads.dim - heads.latent)),
                "TOKENS": self.tokens,
                "BLOCK_M": self.block_m,
                "BLOCK_N": self._block_n(padded),
                "DECODE": self.decode,
                "QUANTIZED": self.quantized,
                "WINDOWED": self.windowed,
                "PRECISION": "ieee" if wide else "tf32",
            },
            warps=self._warps(padded),
            stages=1 if wide else self._stages(padded),
        )
        merge = Config(merge_kernel, shared, warps=2) if self.splits > 1 else None
        return main, merge

    def _block_n(self, padded: int) -> int:
        """Keys of a tile: many where programs have few, as long as a split of a short context still
        has some."""
        if padded > 256:
            return 32 if self.decode and self.hopper and not self.quantized else 16
        if padded > 128 or self.dtype == torch.float32:
            return 32
        return 8192 // padded if self.decode and self.splits > MANY_SPLITS else 64

    def _warps(self, padded: int) -> int:
        """Warps of a program; few where there are many programs."""
        if padded > (256 if self.decode else 128):
            return 8
        if not self.decode:
            return 4 if self.hopper or self.block_m < 64 else 8
        narrow = padded <= 128 and self.splits <= MANY_SPLITS and not self.quantized
        return 2 if narrow else 4

    def _stages(self, padded: int) -> int:
        """How many tiles of keys and values are on their way at once: what compiles unspilled."""
        narrow = self.quantized and not self.hopper and padded <= 64
        few = not self.decode or padded > 128 or narrow or self._block_n(padded) > 64
        return 2 if few else 3

    def workspace(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the splits leave their parts: fp32 `[rows, query heads, splits, dim]`, and the
        maximum and sum of each."""
        parts = self.rows * self.heads.query * self.splits if self.splits > 1 else 1
        return (
            torch.empty(parts * self.heads.dim, dtype=torch.float32, device=device),
            torch.empty(parts * 2, dtype=torch.float32, device=device),
        )
