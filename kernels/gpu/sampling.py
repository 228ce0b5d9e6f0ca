"""From logits to tokens on the device, without sorting the vocabulary.

A draw is the largest of `logit / temperature + Gumbel noise` over the tokens that the filters keep.
The noise comes from a counter (Philox, Salmon et al. 2011) keyed by the row's own random number and
the token, so it depends on nothing else. Filters become one threshold a row: min-p's follows from
the largest logit; those of top-k and top-p come from histograms of the logits' counts and masses,
each refined once inside the bin where the threshold falls. Masses are added as integers, so the
order of arrival cannot change them. Tokens whose logits differ by less than FINE are kept or dropped
together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import Config, power_of_two

BLOCK = 4096
BINS = 1024
# Logits further below the best than this have no weight that fp32 could show.
RANGE = 32.0
FINE = RANGE / BINS / BINS
# Per row: what the passes find. The refined bin's upper edge, and what lies above it.
EDGE, ABOVE_MASS, THRESHOLD, TARGET = 0, 1, 2, 3
STATE = 4
MASS_UNIT = tl.constexpr(float(1 << 40))


@triton.jit
def row_best(partial_best, row, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """The largest scaled logit of a row, from its blocks'."""
    blocks = tl.arange(0, BLOCKS_PADDED)
    parts = tl.load(
        partial_best + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf")
    )
    return tl.max(parts, 0)


@triton.jit
def scaled_logits(logits, temperature, row, columns, VOCAB: tl.constexpr):
    """A block of logits over the temperature; of a greedy row as they are."""
    values = tl.load(
        logits + row.to(tl.int64) * VOCAB + columns, mask=columns < VOCAB, other=float("-inf")
    )
    heat = tl.load(temperature + row)
    return values / tl.where(heat > 0.0, heat, 1.0)


@triton.jit
def best_kernel(
    partial_best, logits, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest scaled logit of each block."""
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = scaled_logits(logits, temperature, row, columns, VOCAB)
    tl.store(partial_best + row * BLOCKS + block, tl.max(x, 0))


@triton.jit
def histogram_kernel(
    counts,
    masses,
    partial_best,
    state,
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
):
    """Counts and masses of logits by their distance from an edge: LEVEL 0 from the best one over
    the whole range, 1 and 2 within the bin that the pass before it found for top-k and top-p."""
    row, block = tl.program_id(0), tl.program_id(1)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    wanted = (tl.load(temperature + row) > 0.0) & ((k > 0) | (p < 1.0))
    if LEVEL == 1:
        wanted = wanted & (k > 0)
    if LEVEL == 2:
        wanted = wanted & (p < 1.0)
    if wanted:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        x = scaled_logits(logits, temperature, row, columns, VOCAB)
        best = row_best(partial_best, row, BLOCKS, BLOCKS_PADDED)
        least = tl.load(min_p + row)
        floor = tl.where(least > 0.0, best + tl.log(tl.maximum(least, 1e-30)), float("-inf"))
        edge, width = best, RANGE / BINS
        if LEVEL > 0:
            edge = tl.load(state + row * 4)
            width = width / BINS
        if LEVEL == 2:
            floor = tl.maximum(floor, tl.load(state + row * 4 + 2))
        distance = (edge - x) / width
        bins = tl.minimum(tl.maximum(distance, 0.0), BINS - 1.0).to(tl.int32)
        inside = (columns < VOCAB) & (x >= floor) & (x > float("-inf"))
        if LEVEL > 0:
            inside = inside & (distance >= 0.0) & (distance < BINS)
        mass = (tl.exp(x - best) * MASS_UNIT).to(tl.int64)
        tl.atomic_add(counts + row * BINS + bins, 1, mask=inside, sem="relaxed")
        tl.atomic_add(masses + row * BINS + bins, mass, mask=inside, sem="relaxed")


@triton.jit
def pivot_kernel(
    counts,
    masses,
    partial_best,
    state,
    kept_mass,
    temperature,
    top_k,
    top_p,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    BINS: tl.constexpr,
    RANGE: tl.constexpr,
    LEVEL: tl.constexpr,
):
    """Find the bin in which a row's threshold falls, and leave the histogram empty.

    `state` fp32 `[rows, 4]`: the edge of the bin to refine, unused, the threshold, unused;
    `kept_mass` int64 `[rows, 4]`: mass above that bin, tokens above it, mass kept by top-k, and
    the mass below the range's bins.
    """
    row = tl.program_id(0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    index = tl.arange(0, BINS)
    number = tl.load(counts + row * BINS + index)
    mass = tl.load(masses + row * BINS + index)
    tl.store(counts + row * BINS + index, tl.zeros([BINS], tl.int32))
    tl.store(masses + row * BINS + index, tl.zeros([BINS], tl.int64))
    best = row_best(partial_best, row, BLOCKS, BLOCKS_PADDED)
    width = RANGE / BINS
    numbers, sums = tl.cumsum(number, 0), tl.cumsum(mass, 0)
    if LEVEL == 0:
        total = tl.sum(mass, 0)
        tl.store(state + row * 4 + 2, float("-inf"))
        if (k > 0) & (k < tl.sum(number, 0)):
            found = tl.min(tl.where(numbers >= k, index, BINS - 1), 0)
            tl.store(state + row * 4, best - found * width)
            above = index < found
            tl.store(kept_mass + row * 4, tl.sum(tl.where(above, mass, 0), 0))
            tl.store(kept_mass + row * 4 + 1, tl.sum(tl.where(above, number, 0), 0).to(tl.int64))
        else:
            # Everything is kept: the refining pass finds an edge below which nothing lies.
            tl.store(state + row * 4, float("-inf"))
            tl.store(kept_mass + row * 4, total)
            tl.store(kept_mass + row * 4 + 1, 0)
        tl.store(kept_mass + row * 4 + 2, total)
    if LEVEL == 1:
        edge = tl.load(state + row * 4)
        if (k > 0) & (edge > float("-inf")):
            rest = k - tl.load(kept_mass + row * 4 + 1)
            found = tl.min(tl.where(numbers >= rest, index, BINS - 1), 0)
            inside = tl.sum(tl.where(index <= found, mass, 0), 0)
            tl.store(state + row * 4 + 2, edge - (found + 1) * (width / BINS))
            tl.store(kept_mass + row * 4 + 2, tl.load(kept_mass + row * 4) + inside)
    if LEVEL == 2:
        pass


@dataclass(frozen=True)
class SamplerShape:
    """A vocabulary, and up to `rows` rows."""

    rows: int
    vocab: int

    @property
    def blocks(self) -> int:
        """Programs of a row."""
        return -(-self.vocab // BLOCK)
