"""Sampling in plain torch: logits `[rows, vocab]` to token ids and logprobs.

Every row is treated by a rule that reads that row alone, so a token never depends on its company.
The order is bias, penalties, masks, temperature, then min-p, top-k and top-p on the scaled
distribution, then one inverse-CDF draw with the row's own uniform number over the kept tokens, best
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.batch import Samples, Sampling

Rows = npt.NDArray[np.int64]

# Most nuclei are small: sort this many candidates first, the whole vocabulary only if they do
# not hold enough probability.
CANDIDATES = 256


class Chooser(Protocol):
    """Picks tokens for some rows of the raw logits, bias, penalties and masks included."""

    def __call__(self, logits: torch.Tensor, rows: Rows, sampling: Sampling) -> Rows:
        """Ids, int64 `[len(rows)]`: drawn where the row's temperature is above 0, else the best."""
        ...


def sample(logits: torch.Tensor, sampling: Sampling, choose: Chooser | None = None) -> Samples:
    """Draw or score one token per row of `logits` (fp32, kept unchanged)."""
    ids = sampling.targets.copy()
    rows = np.flatnonzero(ids < 0)
    if len(rows):
        ids[rows] = (choose or torch_choose)(logits, rows, sampling)
    samples = Samples(ids.tolist())
    score(logits, torch.from_numpy(ids), sampling, samples)
    return samples


def torch_choose(logits: torch.Tensor, rows: Rows, sampling: Sampling) -> Rows:
    """A `Chooser` in plain torch."""
    logits = _adjust(logits, sampling)
    ids: Rows = logits[torch.from_numpy(rows)].argmax(-1).numpy()
    for number, row in enumerate(rows):
        if sampling.temperature[row] > 0:
            ids[number] = _draw(logits[row], sampling, int(row))
    return ids


def _adjust(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Bias, penalties and masks, on a copy if there are any."""
    if not sampling.edited:
        return logits
    adjusted = logits.clone()
    if sampling.bias_rows:
        where = (torch.tensor(sampling.bias_rows), torch.tensor(sampling.bias_ids))
        adjusted.index_put_(where, torch.tensor(sampling.bias_values), accumulate=True)
    for penalty in sampling.penalties:
        row = adjusted[penalty.row]
        counts = torch.from_numpy(penalty.counts)
        repetition = float(sampling.repetition_penalty[penalty.row])
        if repetition != 1.0:
            scaled = torch.where(row > 0, row / repetition, row * repetition)
            row.copy_(torch.where(torch.from_numpy(penalty.seen), scaled, row))
        row -= counts * float(sampling.frequency_penalty[penalty.row])
        row -= (counts > 0) * float(sampling.presence_penalty[penalty.row])
    if sampling.masks is not None:
        forbid(adjusted, sampling.mask_rows, torch.from_numpy(sampling.masks))
    return adjusted


def forbid(logits: torch.Tensor, rows: Sequence[int], masks: torch.Tensor) -> None:
    """Set to -inf, in place, what `masks` (see `Sampling`) do not allow; any device."""
    device, vocab = logits.device, logits.shape[1]
    bits = torch.arange(32, dtype=torch.int32, device=device)
    allowed = ((masks.to(device)[:, :, None] >> bits) & 1).flatten(1)[:, :vocab].bool()
    where = torch.tensor(rows, device=device)
    logits[where] = logits[where].masked_fill(~allowed, float("-inf"))


def _draw(logits: torch.Tensor, sampling: Sampling, row: int) -> int:
    """One draw from a row's filtered distribution."""
    scaled = logits / float(sampling.temperature[row])
    probabilities = torch.softmax(scaled, -1)
    top_k, top_p = int(sampling.top_k[row]), float(sampling.top_p[row])
    min_p = float(sampling.min_p[row])
    vocab = logits.shape[0]
    values, ids = torch.topk(probabilities, min(top_k if top_k > 0 else CANDIDATES, vocab))
    complete = top_k > 0 or vocab <= CANDIDATES
    if not complete and not _enough(values, top_p, min_p, float(sampling.uniform[row])):
        values, ids = torch.sort(probabilities, descending=True, stable=True)
        complete = True
    if min_p > 0:
        kept = int((values >= min_p * values[0]).sum())
        complete |= kept < len(values)
        values, ids = values[:kept], ids[:kept]
    cumulative = values.double().cumsum(0)
    total = float(cumulative[-1]) if complete else 1.0
    if top_p < 1.0:
        kept = min(int(torch.searchsorted(cumulative, top_p * total)) + 1, len(values))
        cumulative, total = cumulative[:kept], float(cumulative[kept - 1])
    target = float(sampling.uniform[row]) * total
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(ids[min(index, len(cumulative) - 1)])


def _enough(values: torch.Tensor, top_p: float, min_p: float, uniform: float) -> bool:
    """Whether the sorted candidates hold everything that the filters keep or the draw reaches."""
    mass = float(values.double().sum())
    if min_p > 0:
        return float(values[-1]) < min_p * float(values[0])
    return mass > (top_p if top_p < 1.0 else uniform)


def score(logits: torch.Tensor, ids: torch.Tensor, sampling: Sampling, samples: Samples) -> None:
    """Fill in logprobs of the raw distribution for the rows that want them; any device."""
    count = len(sampling.targets)
    samples.logprobs = [None] * count
    samples.top = [[] for _ in range(count)]
    wanted = np.flatnonzero(sampling.top_logprobs >= 0)
    if not len(wanted):
        return
    rows = torch.from_numpy(wanted).to(logits.device)
    logprobs = torch.log_softmax(logits[rows], -1)
    chosen = logprobs.gather(1, ids[rows][:, None])[:, 0].tolist()
    most = int(sampling.top_logprobs[wanted].max())
    best = torch.topk(logprobs, min(most, logits.shape[1])) if most > 0 else None
    for number, row in enumerate(wanted.tolist()):
        samples.logprobs[row] = chosen[number]
        if best is not None:
            keep = int(sampling.top_logprobs[row])
            ids_of, values_of = best.indices[number, :keep], best.values[number, :keep]
            samples.top[row] = list(zip(ids_of.tolist(), values_of.tolist(), strict=True))
