"""A matrix in four bits: plainly, or so that what it does to calibration inputs changes least.

`gptq` is GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after another, and what
rounding one changes is made good in those that are left, as far as inputs allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

GROUP = 32
# Ranges of a group that are tried, as shares of the whole one.
SHARES = (1.0, 0.93, 0.86, 0.79)
# Columns whose corrections wait until all of them are rounded.
BLOCK = 128
# Added to the diagonal, as a share of its mean: inputs that never vary allow no corrections. The
# second where there are no more rows than inputs.
DAMPING, FEW_DAMPING = 0.01, 0.1


@dataclass(frozen=True)
class Quantized:
    """`numbers` uint8 `[out, in]` from 0 to 15, `scales` and `lows` fp16 `[out, in / 32]`."""

    numbers: torch.Tensor
    scales: torch.Tensor
    lows: torch.Tensor

    def values(self) -> torch.Tensor:
        """What they stand for, fp32 `[out, in]`."""
        shaped = self.numbers.float().view(*self.scales.shape, GROUP)
        return (shaped * self.scales.float()[..., None] + self.lows.float()[..., None]).flatten(1)

    def blocks(self) -> torch.Tensor:
        """As ggml's Q4_1, uint8 `[out, in / 32 * 20]`: scale, lowest value, then 16 bytes, whose
        low halves are the first 16 numbers."""
        shaped = self.numbers.view(*self.scales.shape, GROUP)
        halves = torch.stack([self.scales, self.lows], -1).view(torch.uint8)
        nibbles = shaped[..., :16] | shaped[..., 16:] << 4
        return torch.cat([halves, nibbles], -1).flatten(1)


def fit_group(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and lowest value, fp16 `[...]`, of groups `[..., 32]`: of several ranges, each with the
    line through its numbers that fits best, the one that leaves the least squared error."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least = torch.full(low.shape, torch.inf)
    for share in SHARES:
        step = (high - low) * (share / 15)
        q = rounded(x, step, (low + high) / 2 - 7.5 * step)
        mean, middle = x.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
        spread = (q - middle).square().sum(-1, keepdim=True)
        along = ((q - middle) * (x - mean)).sum(-1, keepdim=True)
        scale = torch.where(spread > 0, along / spread.clamp(min=1e-30), 0.0).half()
        lowest = (mean - scale.float() * middle).half()
        q = rounded(x, scale.float(), lowest.float())
        error = (x - q * scale.float() - lowest.float()).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        if best is None:
            best = scale, lowest
        best = torch.where(better, scale, best[0]), torch.where(better, lowest, best[1])
    assert best is not None
    return best[0][..., 0], best[1][..., 0]


def rounded(x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The whole numbers from 0 to 15 nearest to `(x - low) / scale`; 0 where the scale is."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((x - low) * inverse).round().clamp(0, 15)


def plain(weight: torch.Tensor) -> Quantized:
    """Each group by itself; `weight` is fp32 `[out, in]`, `in` a multiple of 32."""
    groups = weight.view(len(weight), -1, GROUP)
    scales, lows = fit_group(groups)
    numbers = rounded(groups, scales.float()[..., None], lows.float()[..., None])
    return Quantized(numbers.to(torch.uint8).flatten(1), scales, lows)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a matrix is given: x^T x summed over `rows` inputs x, `products` fp32 `[in, in]`."""

    products: torch.Tensor
    rows: int

    def damped(self, more: float = 1.0) -> torch.Tensor:
        """The products with something on the diagonal, so that they can be inverted: the more the
        fewer rows there are, since what they show of each other is then partly chance."""
        products = self.products.clone()
        share = max(DAMPING, FEW_DAMPING * min(1.0, len(products) / max(1, self.rows))) * more
        diagonal = products.diagonal()
        diagonal += share * diagonal.mean().clamp(min=1e-8)
        return products

    @cached_property
    def upper(self) -> torch.Tensor:
        """The upper Cholesky factor of the damped products' inverse. Raises ValueError if there is
        none."""
        for more in (1.0, 10.0, 100.0):
            factor, failed = torch.linalg.cholesky_ex(self.damped(more))
            if not int(failed):
                upper: torch.Tensor
                upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
                return upper
        raise ValueError("its inputs are not finite")


def gptq(weight: torch.Tensor, inputs: Inputs) -> Quantized:
    """The same, with errors made good. Raises ValueError if the inputs are not finite."""
    # Columns lie together this way.
    columns, count, upper = weight.T.contiguous(), weight.shape[1], inputs.upper
    numbers = torch.empty(columns.shape, dtype=torch.uint8)
    scales = torch.empty(count // GROUP, len(weight), dtype=torch.float16)
    lows = torch.empty_like(scales)
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = torch.zeros(end - start, len(weight))
        for column in range(start, end):
            group = column // GROUP
            if column % GROUP == 0:
                values = columns[column : column + GROUP].T
                scales[group], lows[group] = fit_group(values)
            scale, low = scales[group].float(), lows[group].float()
            q = rounded(columns[column], scale, low)
            numbers[column] = q.to(torch.uint8)
            error = (columns[column] - q * scale - low) / upper[column, column]
            columns[column:end] -= upper[column, column:end, None] * error
            errors[column - start] = error
        columns[end:] -= upper[start:end, end:].T @ errors
    return Quantized(numbers.T.contiguous(), scales.T.contiguous(), lows.T.contiguous())
