"""From logits to tokens on the device, without sorting the vocabulary.

A draw is the largest of `logit / temperature + Gumbel noise` over the tokens that the filters keep.
The noise comes from a counter (Philox, Salmon et al. 2011) keyed by the row's own random number and
the token, so it depends on nothing else. Filters become one threshold a row: min-p's follows from
the largest logit; those of top-k and top-p come from histograms of the logits' counts and masses,
each refined once inside the bin where the threshold falls. Masses are added as integers, so the
order of arrival cannot change them. Tokens whose scaled logits differ by less than `FINE` are kept
or dropped together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import Config, enter, power_of_two

BLOCK = 4096
WARPS = 16
BINS = 1024
# Logits further below the best than this have no weight that fp32 could show.
RANGE = 32.0
FINE = RANGE / BINS / BINS
MASS_UNIT = tl.constexpr(float(1 << 40))


@triton.jit
def row_best(partial_best, row, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """The largest scaled logit of a row, from its blocks'."""
    blocks = tl.arange(0, BLOCKS_PADDED)
    parts = tl.load(partial_best + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf"))
    return tl.max(parts, 0)


@triton.jit
def scaled_logits(logits, temperature, row, columns, VOCAB: tl.constexpr):
    """A block of logits over the temperature; of a greedy row as they are."""
    values = tl.load(
        logits + row.to(tl.int64) * VOCAB + columns, mask=columns < VOCAB, other=float("-inf")
    )
    # A broken model's NaN must not become an id that no table has.
    values = tl.where(values == values, values, float("-inf"))
    heat = tl.load(temperature + row)
    return values / tl.where(heat > 0.0, heat, 1.0)


@triton.jit
def best_kernel(
    partial_best,
    logits,
    temperature,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The largest scaled logit of each block."""
    enter(EARLY)
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = scaled_logits(logits, temperature, row, columns, VOCAB)
    tl.store(partial_best + row * BLOCKS + block, tl.max(x, 0))


@triton.jit
def histogram_kernel(
    counts,
    masses,
    partial_best,
    edges,
    thresholds,
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    BINS: tl.constexpr,
    RANGE: tl.constexpr,
    LEVEL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Counts and masses of the candidates by their distance from an edge.

    LEVEL 0 has the whole range, from the best logit down; 1 and 3 the bin that the pass before
    found for top-k and top-p; 2 the whole range again, of what top-k kept.
    """
    enter(EARLY)
    row, block = tl.program_id(0), tl.program_id(1)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    wanted = k > 0
    if LEVEL >= 2:
        wanted = p < 1.0
    if wanted & (tl.load(temperature + row) > 0.0):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        x = scaled_logits(logits, temperature, row, columns, VOCAB)
        best = row_best(partial_best, row, BLOCKS, BLOCKS_PADDED)
        inside = (columns < VOCAB) & (x > float("-inf"))
        least = tl.load(min_p + row)
        if least > 0.0:
            inside = inside & (x >= best + tl.log(least))
        if LEVEL >= 2:
            inside = inside & (x >= tl.load(thresholds + row))
        width: tl.constexpr = RANGE / BINS
        bins = tl.minimum((best - x) / width, BINS - 1.0).to(tl.int32)
        if LEVEL % 2 == 1:
            edge = tl.load(edges + row)
            # No bin is refined where the edge lies above the best logit.
            inside = inside & (bins == ((best - edge) / width + 0.5).to(tl.int32))
            finer = tl.maximum((edge - x) / (width / BINS), 0.0)
            bins = tl.minimum(finer, BINS - 1.0).to(tl.int32)
        mass = (tl.exp(x - best) * MASS_UNIT).to(tl.int64)
        tl.atomic_add(counts + row * BINS + bins, 1, mask=inside, sem="relaxed")
        tl.atomic_add(masses + row * BINS + bins, mass, mask=inside, sem="relaxed")


@triton.jit
def pivot_kernel(
    counts,
    masses,
    partial_best,
    edges,
    thresholds,
    above,
    temperature,
    top_k,
    top_p,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    BINS: tl.constexpr,
    RANGE: tl.constexpr,
    LEVEL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Find the bin in which a row's threshold falls, and leave the histogram empty.

    Coarse passes write `edges` fp32 `[rows]`, the upper edge of the bin (above every
    logit if nothing is to be dropped), and `above` int64
    `[rows, 2]`: how much lies above it, and how much is to be kept (tokens for top-k, mass for
    top-p). Fine ones write `thresholds` fp32 `[rows]`, the least scaled logit that is kept.
    """
    enter(EARLY)
    row = tl.program_id(0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    if LEVEL == 0:
        tl.store(thresholds + row, float("-inf"))
    wanted = k > 0
    if LEVEL >= 2:
        wanted = p < 1.0
    if wanted & (tl.load(temperature + row) > 0.0):
        index = tl.arange(0, BINS)
        if LEVEL < 2:
            amount = tl.load(counts + row * BINS + index).to(tl.int64)
        else:
            amount = tl.load(masses + row * BINS + index)
        # Loads and stores may lie on other threads: nobody empties what another has yet to read.
        tl.debug_barrier()
        tl.store(counts + row * BINS + index, tl.zeros([BINS], tl.int32))
        tl.store(masses + row * BINS + index, tl.zeros([BINS], tl.int64))
        sums = tl.cumsum(amount, 0)
        width: tl.constexpr = RANGE / BINS
        if LEVEL % 2 == 0:
            if LEVEL == 0:
                keep = k.to(tl.int64)
            else:
                total = tl.sum(amount, 0)
                keep = tl.maximum((total.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)
            # The lowest bin holds everything below the range: nothing there is ever dropped.
            found = tl.min(tl.where(sums >= keep, index, BINS - 1), 0)
            best = row_best(partial_best, row, BLOCKS, BLOCKS_PADDED)
            edge = tl.where(found < BINS - 1, best - found * width, best + 1.0)
            tl.store(edges + row, edge)
            tl.store(above + row * 2, tl.sum(tl.where(index < found, amount, 0), 0))
            tl.store(above + row * 2 + 1, keep)
        else:
            edge = tl.load(edges + row)
            rest = tl.load(above + row * 2 + 1) - tl.load(above + row * 2)
            found = tl.min(tl.where(sums >= rest, index, BINS - 1), 0)
            # A little less: a logit on the edge must not fall out by rounding.
            threshold = edge - (found + 1) * (width / BINS) - 0.25 * (width / BINS)
            if edge <= row_best(partial_best, row, BLOCKS, BLOCKS_PADDED):
                tl.store(thresholds + row, tl.maximum(threshold, tl.load(thresholds + row)))


@triton.jit
def gumbel(low, high, columns):
    """Standard Gumbel noise of a row's key for each token."""
    zero = columns * 0
    bits, _, _, _ = tl.philox_impl(
        columns.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32),
        low.to(tl.uint32), high.to(tl.uint32), 10,
    )  # fmt: skip
    # -log of an exponential number; its small values make the large noise, so they are exact.
    share = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = share + share * share * 0.5
    rest = -tl.log(tl.maximum(1.0 - share, 2.9802322387695312e-08))
    return -tl.log(tl.where(share < 0.001, small, rest))


@triton.jit
def draw_kernel(
    partial_values,
    partial_ids,
    partial_best,
    thresholds,
    logits,
    temperature,
    min_p,
    keys,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    FILTERED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The best token of each block: by logit if greedy, else by logit and noise."""
    enter(EARLY)
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = scaled_logits(logits, temperature, row, columns, VOCAB)
    if tl.load(temperature + row) > 0.0:
        noise = gumbel(tl.load(keys + row * 2), tl.load(keys + row * 2 + 1), columns)
        if FILTERED:
            least = tl.load(min_p + row)
            floor = tl.load(thresholds + row)
            if least > 0.0:
                best = row_best(partial_best, row, BLOCKS, BLOCKS_PADDED)
                floor = tl.maximum(floor, best + tl.log(least))
            x = tl.where(x >= floor, x + noise, float("-inf"))
        else:
            x += noise
    value, place = tl.max(x, 0, return_indices=True)
    tl.store(partial_values + row * BLOCKS + block, value)
    tl.store(partial_ids + row * BLOCKS + block, block * BLOCK + place)


@triton.jit
def pick_kernel(
    ids,
    last_ids,
    partial_values,
    partial_ids,
    targets,
    slots,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row's token: the one that is to be scored, or the best of the blocks'; what is drawn for a
    slot stays there as the next step's input."""
    enter(EARLY)
    row = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS_PADDED)
    values = tl.load(
        partial_values + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf")
    )
    _, place = tl.max(values, 0, return_indices=True)
    token = tl.load(partial_ids + row * BLOCKS + tl.minimum(place, BLOCKS - 1)).to(tl.int64)
    token = tl.minimum(token, VOCAB - 1)
    target = tl.load(targets + row).to(tl.int64)
    token = tl.where(target >= 0, target, token)
    tl.store(ids + row, token)
    slot = tl.load(slots + row)
    if slot >= 0:
        tl.store(last_ids + slot, token)


@triton.jit
def penalize_kernel(
    logits,
    rows,
    counts,
    seen,
    factors,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Penalties of some rows, in place; `counts` int32, `seen` int8 `[rows, vocab]`,
    `factors` fp32 `[rows, 4]`: repetition, presence, frequency and nothing."""
    enter(EARLY)
    index, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    place = logits + tl.load(rows + index).to(tl.int64) * VOCAB + columns
    x = tl.load(place, mask=inside, other=0.0)
    history = index.to(tl.int64) * VOCAB + columns
    count = tl.load(counts + history, mask=inside, other=0).to(tl.float32)
    known = tl.load(seen + history, mask=inside, other=0) != 0
    factor = tl.load(factors + index * 4)
    x = tl.where(known, tl.where(x > 0.0, x / factor, x * factor), x)
    x -= count * tl.load(factors + index * 4 + 2)
    x -= tl.where(count > 0.0, tl.load(factors + index * 4 + 1), 0.0)
    tl.store(place, x, mask=inside)


@dataclass(frozen=True)
class SamplerShape:
    """Up to `rows` rows over a vocabulary."""

    rows: int
    vocab: int

    @property
    def blocks(self) -> int:
        """Programs of a row."""
        return -(-self.vocab // BLOCK)

    def configs(self, *, filtered: bool) -> list[Config]:
        """Every kernel of a draw, in order: best, (histogram, pivot) x 4 if some row has filters,
        draw, pick."""
        vocab = {"VOCAB": self.vocab, "BLOCK": BLOCK, "BLOCKS": self.blocks}
        blocks = {"BLOCKS": self.blocks, "BLOCKS_PADDED": power_of_two(self.blocks)}
        bins = {"BINS": BINS, "RANGE": RANGE}
        made = [Config(best_kernel, vocab, WARPS)] if filtered else []
        for level in range(4 if filtered else 0):
            made.append(
                Config(histogram_kernel, {**vocab, **blocks, **bins, "LEVEL": level}, WARPS)
            )
            made.append(Config(pivot_kernel, {**blocks, **bins, "LEVEL": level}))
        return [
            *made,
            Config(draw_kernel, {**vocab, **blocks, "FILTERED": filtered}, WARPS),
            Config(pick_kernel, {"VOCAB": self.vocab, **blocks}),
        ]


class Sampler:
    """The buffers of a draw, and its launches."""

    def __init__(self, shape: SamplerShape, device: torch.device) -> None:
        self._shape = shape
        rows, blocks = shape.rows, shape.blocks

        def make(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._best, self._values = make(rows, blocks), make(rows, blocks)
        self._ids = make(rows, blocks, dtype=torch.int32)
        self._edges, self._thresholds = make(rows), make(rows)
        self._above = make(rows, 2, dtype=torch.int64)
        self._counts = make(rows, BINS, dtype=torch.int32)
        self._masses = make(rows, BINS, dtype=torch.int64)

    def draw(
        self,
        rows: int,
        logits: torch.Tensor,
        floats: torch.Tensor,
        ints: torch.Tensor,
        ids: torch.Tensor,
        last_ids: torch.Tensor,
        *,
        filtered: bool,
    ) -> None:
        """Tokens of `rows` rows of `logits` fp32 `[rows, vocab]` to `ids` int64 `[rows]`;
        `filtered` if some row has top-k, top-p or min-p.

        `floats` `[3, rows or more]`: temperature, top-p, min-p. `ints` int32 `[5, ...]`: top-k,
        targets, slots, and two rows that hold the pairs of each row's key. Ids that are drawn for
        a slot (not -1) also go to `last_ids` int64 `[slots]`.
        """
        temperature, top_p, min_p = floats
        top_k, targets, slots = ints[:3]
        keys = ints[3:]
        *filters, draw, pick = self._shape.configs(filtered=filtered)
        grid = (rows, self._shape.blocks)
        if filtered:
            best, *passes = filters
            best.launch(grid, self._best, logits, temperature)
            found = (self._counts, self._masses, self._best, self._edges, self._thresholds)
            for histogram, pivot in zip(passes[::2], passes[1::2], strict=True):
                histogram.launch(grid, *found, logits, temperature, top_k, top_p, min_p)
                pivot.launch((rows,), *found, self._above, temperature, top_k, top_p)
        draw.launch(
            grid, self._values, self._ids, self._best, self._thresholds, logits, temperature,
            min_p, keys,
        )  # fmt: skip
        pick.launch((rows,), ids, last_ids, self._values, self._ids, targets, slots)


def penalize(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    seen: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """Apply penalties to `rows` int64 of `logits`, in place; arguments as the kernel's."""
    vocab = logits.shape[1]
    config = Config(penalize_kernel, {"VOCAB": vocab, "BLOCK": BLOCK}, WARPS)
    config.launch((len(rows), -(-vocab // BLOCK)), logits, rows, counts, seen, factors)
