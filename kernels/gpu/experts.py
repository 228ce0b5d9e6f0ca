"""Mixture of experts: rows sorted by expert, in blocks that each belong to one.

Sizes follow from the number of rows alone, so that a launch can be captured: there are as many
blocks as the worst way of choosing fills, and those that nobody fills are passed over (the layout
of MegaBlocks, arXiv 2211.15841, with padded blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import Config, enter, power_of_two
from kernels.ops import Experts

# Choices that a program looks at at a time.
CHOICES = 1024
# Rows of a block: few where an expert has few.
FEW, MANY = 16, 64


@triton.jit
def within_groups(
    left,
    number,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """How much experts are liked, -inf but in the KEPT best of GROUPS groups of SIZE: by the two
    best of each together if PAIRS, or by the best."""
    group = number // SIZE
    worth = tl.where(number < GROUPS, 0.0, -float("inf"))
    for one in tl.static_range(GROUPS):
        own = tl.where(group == one, left, -float("inf"))
        best = tl.max(own, 0)
        if PAIRS:
            first = tl.min(tl.where(own == best, number, SIZE * GROUPS), 0)
            best += tl.max(tl.where(number == first, -float("inf"), own), 0)
        worth = tl.where(number == one, best, worth)
    kept = number < 0
    for _ in tl.static_range(KEPT):
        best = tl.min(tl.where(worth == tl.max(worth, 0), number, GROUPS), 0)
        kept |= group == best
        worth = tl.where(number == best, -float("inf"), worth)
    return tl.where(kept, left, -float("inf"))


@triton.jit
def route_kernel(
    chosen,
    shares,
    scores,
    preference,
    factors,
    live,
    COUNT: tl.constexpr,
    USED: tl.constexpr,
    SHARED: tl.constexpr,
    SCORES: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SIGMOID: tl.constexpr,
    PREFERENCE: tl.constexpr,
    FACTORS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row's likeliest experts, of equals the lower number, and their shares, then the shared
    ones. A row behind the `live` ones chooses the number behind all: no weights are read for it."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    number, place = tl.arange(0, BLOCK), tl.arange(0, PLACES)
    known = number < COUNT
    values = tl.load(scores + row * SCORES + number, mask=known, other=-float("inf"))
    inside = row < tl.load(live)
    # Padding may hold anything.
    values = tl.where(inside, values.to(tl.float32), 0.0)
    if SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-values))
        total = 1.0
    else:
        weights = tl.exp(values - tl.max(values, 0))
        total = tl.sum(weights, 0)
    left = weights
    if PREFERENCE:
        left = weights / total + tl.load(preference + number, mask=known, other=0.0)
    left = tl.where(known, left, -float("inf"))
    if GROUPS > 1:
        left = within_groups(left, number, COUNT // GROUPS, GROUPS, KEPT, SIGMOID)
    numbers, found = tl.zeros([PLACES], tl.int32), tl.zeros([PLACES], tl.float32)
    for k in tl.static_range(USED):
        best = tl.min(tl.where(left == tl.max(left, 0), number, BLOCK), 0)
        numbers = tl.where(place == k, best, numbers)
        found = tl.where(place == k, tl.sum(tl.where(number == best, weights, 0.0), 0), found)
        left = tl.where(number == best, -float("inf"), left)
    if NORMALIZED:
        total = tl.maximum(tl.sum(found, 0), 1e-20)
    found = found / total * SCALE
    if FACTORS:
        found *= tl.load(factors + numbers, mask=place < USED, other=0.0)
    if SHARED > 0:
        numbers = tl.where(place < USED, numbers, COUNT + place - USED)
        whole = place * 0 + 1.0
        if SCORES > COUNT:
            shared = inside & (place >= USED) & (place < USED + SHARED)
            gate = tl.load(scores + row * SCORES + COUNT + place - USED, mask=shared, other=0.0)
            whole = 1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))
        found = tl.where(place < USED, found, whole)
    numbers = tl.where(inside, numbers, COUNT + SHARED)
    at = row * (USED + SHARED) + place
    tl.store(chosen + at, numbers, mask=place < USED + SHARED)
    tl.store(shares + at, found, mask=place < USED + SHARED)


@triton.jit(do_not_specialize=["choices", "first"])
def count_kernel(counts, chosen, choices, first, CHOICES: tl.constexpr, EARLY: tl.constexpr):
    """How often an expert was chosen."""
    enter(EARLY)
    expert, at = tl.program_id(0), tl.arange(0, CHOICES)
    found = tl.zeros([CHOICES], tl.int32)
    for start in range(0, choices, CHOICES):
        inside = start + at < choices
        number = tl.load(chosen + start + at, mask=inside, other=-1)
        found += (number == first + expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["choices", "first", "blocks"])
def place_kernel(
    places,
    sources,
    experts,
    counts,
    chosen,
    choices,
    first,
    blocks,
    OWN: tl.constexpr,
    USED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Where an expert's rows go: `places` of its choices, `sources` of these places (-1 where a
    block is not full), and `experts` of its blocks. A last program marks what belongs to none."""
    enter(EARLY)
    expert, at = tl.program_id(0), tl.arange(0, CHOICES)
    number, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    # An expert's blocks.
    filled = (tl.load(counts + number, mask=number < OWN, other=0) + ROWS - 1) // ROWS
    block = tl.sum(tl.where(number < expert, filled, 0), 0)
    if expert == OWN:
        while block < blocks:
            tl.store(experts + block, -1)
            tl.store(sources + block * ROWS + row, tl.full([ROWS], -1, tl.int32))
            block += 1
        for start in range(0, choices, CHOICES):
            inside = start + at < choices
            owner = tl.load(chosen + start + at, mask=inside, other=0) - first
            elsewhere = (owner < 0) | (owner >= OWN)
            tl.store(places + start + at, at * 0 - 1, mask=inside & elsewhere)
    else:
        end = block + tl.sum(tl.where(number == expert, filled, 0), 0)
        place = block * ROWS
        for start in range(0, choices, CHOICES):
            inside = start + at < choices
            owner = tl.load(chosen + start + at, mask=inside, other=-1) - first
            mine = inside & (owner == expert)
            target = place + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(places + start + at, target, mask=mine)
            tl.store(sources + target, (start + at) // USED, mask=mine)
            place += tl.sum(mine.to(tl.int32), 0)
        tl.store(
            sources + place + row, tl.full([ROWS], -1, tl.int32), mask=place + row < end * ROWS
        )
        while block < end:
            tl.store(experts + block, expert)
            block += 1


@triton.jit
def gather_kernel(out, x, sources, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The rows that `sources` names, zeros for -1."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = tl.load(sources + row).to(tl.int64)
    values = tl.load(x + source * WIDTH + column, mask=inside & (source >= 0), other=0.0)
    tl.store(out + row * WIDTH + column, values, mask=inside)


@triton.jit
def scatter_kernel(
    out, y, places, shares, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """What an expert says to a row, times its share; zeros if it is not here."""
    enter(EARLY)
    choice = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.load(places + choice).to(tl.int64)
    values = tl.load(y + place * WIDTH + column, mask=inside & (place >= 0), other=0.0)
    values = values.to(tl.float32) * tl.load(shares + choice)
    tl.store(out + choice * WIDTH + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts_kernel(
    out, x, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """A row's parts, added in order."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        place = (row * PARTS + part) * WIDTH + column
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Layout:
    """How `rows` rows are spread: blocks of `block_rows` places."""

    experts: Experts
    rows: int
    invariant: bool = False

    @property
    def choices(self) -> int:
        """Of all rows."""
        return self.rows * self.experts.places

    @property
    def block_rows(self) -> int:
        """Rows of a block, which all go through one expert."""
        few = self.choices <= FEW * self.experts.total and not self.invariant
        return FEW if few else MANY

    @property
    def blocks(self) -> int:
        """As many as can be wanted: one that is not full for each expert, and full ones."""
        return min(self.choices, self.experts.own) + self.choices // self.block_rows

    def route_config(self, *, preference: bool = False, factors: bool = False) -> Config:
        """The choice of a row's experts."""
        experts = self.experts
        block = power_of_two(experts.count)
        constants = {
            "COUNT": experts.count,
            "USED": experts.used,
            "SHARED": experts.shared,
            "SCORES": experts.scores,
            "NORMALIZED": experts.normalized,
            "SIGMOID": experts.sigmoid,
            "PREFERENCE": preference,
            "FACTORS": factors,
            "SCALE": experts.scale,
            "GROUPS": experts.groups,
            "KEPT": experts.kept,
            "BLOCK": block,
            "PLACES": power_of_two(experts.places),
        }
        return Config(route_kernel, constants, max(1, block // 128))

    def count_config(self) -> Config:
        """The number of an expert's rows."""
        return Config(count_kernel, {"CHOICES": CHOICES}, 4)

    def place_config(self) -> Config:
        """Where an expert's rows go."""
        constants = {
            "OWN": self.experts.own,
            "USED": self.experts.places,
            "ROWS": self.block_rows,
            "BLOCK": power_of_two(self.experts.own),
            "CHOICES": CHOICES,
        }
        return Config(place_kernel, constants, 4)


@dataclass(frozen=True)
class Sorted:
    """A step's choices: `places` int32 `[choices]` and `shares` fp32 of them, `sources` int32
    `[blocks * block_rows]`, and the `experts` int32 `[blocks]`, -1 where nobody goes."""

    places: torch.Tensor
    shares: torch.Tensor
    sources: torch.Tensor
    experts: torch.Tensor


def sort_rows(
    scores: torch.Tensor,
    layout: Layout,
    live: torch.Tensor,
    preference: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> Sorted:
    """Choose each row's experts from scores `[rows, experts.scores]` and what is preferred, fp32
    `[count]`, multiply their shares by `factors`, which are alike, and lay the rows out by expert;
    those behind the first `live`, int32 `[1]`, are padding and go nowhere."""
    experts, device = layout.experts, scores.device

    def integers(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    chosen, counts = integers(layout.choices), integers(experts.own)
    shares = torch.empty(layout.choices, dtype=torch.float32, device=device)
    made = Sorted(
        integers(layout.choices),
        shares,
        integers(layout.blocks * layout.block_rows),
        integers(layout.blocks),
    )
    route = layout.route_config(preference=preference is not None, factors=factors is not None)
    liked, by = (scores if vector is None else vector for vector in (preference, factors))
    route.launch((layout.rows,), chosen, shares, scores, liked, by, live)
    whole = (layout.choices, experts.first)
    layout.count_config().launch((experts.own,), counts, chosen, *whole)
    layout.place_config().launch(
        (experts.own + 1,), made.places, made.sources, made.experts, counts, chosen, *whole,
        layout.blocks,
    )  # fmt: skip
    return made
