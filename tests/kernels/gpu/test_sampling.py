"""Sampling on the GPU: what is kept, what is drawn, and that nothing else matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.batch import Penalty, Sampling
from kernels.gpu.draws import Draws
from kernels.gpu.sampling import FINE, gumbel
from kernels.sampling import torch_choose
from tests.kernels.gpu.filled import HOST
from tests.kernels.test_sampling import masked, options

VOCAB = 5000


@triton.jit
def noise_kernel(out, low, high, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(out + columns, gumbel(tl.load(low), tl.load(high), columns))


def noise(uniform: float, size: int) -> torch.Tensor:
    """The noise of a row with this random number."""
    bits = int(uniform * 2**53)
    words = np.array([bits & 0xFFFFFFFF, bits >> 32], np.uint32).view(np.int32)
    low, high = torch.from_numpy(words)[:1].clone(), torch.from_numpy(words)[1:].clone()
    out = torch.zeros(triton.next_power_of_2(size))
    noise_kernel[(1,)](out, low, high, SIZE=len(out))
    return out[:size]


def draw(logits: torch.Tensor, sampling: Sampling) -> list[int]:
    rows, vocab = logits.shape
    draws = Draws(rows, vocab, torch.zeros(rows, dtype=torch.int64), HOST)

    def launch(count: int, filtered: bool) -> None:
        draws.launch(count, logits, filtered=filtered)

    first = draws.draw(logits, sampling, launch).tolist()
    # Each draw leaves its histograms empty for the next.
    assert draws.draw(logits, sampling, launch).tolist() == first
    return first


def random_logits(rows: int, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * spread


def kept(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that the filters keep, by sorting."""
    probabilities = torch.softmax(scaled.double(), -1)
    values, ids = torch.sort(probabilities, descending=True, stable=True)
    if top_k > 0:
        values, ids = values[:top_k], ids[:top_k]
    values = values[values >= min_p * values[0]]
    sums = values.cumsum(0)
    count = int(torch.searchsorted(sums, top_p * sums[-1])) + 1 if top_p < 1 else len(values)
    return set(ids[: min(count, len(values))].tolist())


def test_noise_is_gumbels_and_each_rows_own() -> None:
    first, other = noise(0.123, 1 << 16), noise(0.123 + 2.0**-50, 1 << 16)
    for sample in (first, other):
        assert float(sample.mean()) == pytest.approx(0.57722, abs=0.02)
        assert float(sample.var()) == pytest.approx(1.64493, abs=0.05)
        sums = torch.exp(-torch.exp(-sample.double().sort().values))
        even = torch.arange(1, len(sums) + 1) / len(sums)
        assert float((sums - even).abs().max()) < 0.01
        assert torch.isfinite(sample).all()
    correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
    assert abs(float(correlation)) < 0.02


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 40},
    {"top_k": 4000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.05},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.001},
    {"top_k": 5, "top_p": 0.5, "temperature": 2.5},
    {"top_p": 0.95, "temperature": 0.2},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_draw_is_the_best_of_what_the_filters_keep_with_noise(filters: dict[str, Any]) -> None:
    logits = random_logits(4)
    sampling = options(4, **filters)
    for row, found in enumerate(draw(logits, sampling)):
        scaled = logits[row] / float(sampling.temperature[row])
        keep = sorted(
            kept(
                scaled,
                int(sampling.top_k[row]),
                float(sampling.top_p[row]),
                float(sampling.min_p[row]),
            )
        )
        noisy = (scaled + noise(float(sampling.uniform[row]), VOCAB))[keep]
        assert found == keep[int(noisy.argmax())]


def test_ties_at_the_threshold_are_kept_together() -> None:
    logits = torch.zeros(64, 40)
    logits[:, :4] = 5.0
    logits[:, 4:8] = 5.0 - FINE / 8
    drawn = draw(logits, options(64, top_k=6))
    assert set(drawn) == set(range(8))


def test_greedy_rows_take_the_first_best_token_whatever_else_is_asked() -> None:
    logits = random_logits(3)
    logits[1, 4321] = logits[1, 17] = 50.0
    found = draw(logits, options(3, temperature=0, top_k=7, top_p=0.3, min_p=0.2))
    assert found == logits.argmax(-1).tolist()
    assert found[1] == 17
    assert draw(logits, options(3, top_k=1)) == found


def test_a_broken_models_logits_still_give_ids_of_the_vocabulary() -> None:
    logits = random_logits(2)
    logits[0] = float("nan")
    logits[1, ::2] = float("nan")
    found = draw(logits, options(2, top_p=0.9))
    assert all(0 <= token < VOCAB for token in found)
    assert found[1] % 2 == 1


def test_given_tokens_are_scored_not_drawn_and_company_changes_nothing() -> None:
    logits = random_logits(5)
    targets = np.array([-1, 7, -1, 9, -1])
    together = draw(logits, options(5, targets=targets, top_p=0.9))
    assert (together[1], together[3]) == (7, 9)
    uniform = options(5).uniform
    for row in (0, 2, 4):
        alone = options(1, top_p=0.9, uniform=uniform[row : row + 1])
        assert draw(logits[row : row + 1], alone) == [together[row]]


def test_drawn_ids_follow_bias_and_penalties() -> None:
    logits = random_logits(3, 300)
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, 300).astype(np.int32)
    sampling = options(3, temperature=0, repetition_penalty=1.5, presence_penalty=0.7)
    sampling.frequency_penalty[:] = 0.4
    sampling.bias_rows, sampling.bias_ids = [0, 2], [5, int(logits[2].argmax())]
    sampling.bias_values = [100.0, float("-inf")]
    sampling.penalties = [Penalty(1, counts, counts > 0), Penalty(2, counts, counts > 1)]
    before = logits.clone()
    wanted = torch_choose(logits, np.arange(3), sampling).tolist()
    assert draw(logits, sampling) == wanted
    assert wanted[0] == 5
    assert torch.equal(logits, before), "the raw logits are kept for logprobs"


def test_only_what_a_mask_allows_is_drawn() -> None:
    logits = random_logits(6, 700)
    allowed = np.random.default_rng(1).random((3, 700)) < 0.02
    allowed[2] = np.arange(700) == 41
    sampling = options(6, temperature=np.array([0, 1, 0, 1, 1, 1], np.float32), top_p=0.9)
    ids = draw(logits, masked(sampling, [0, 1, 4], allowed))
    assert all(allowed[number, ids[row]] for number, row in enumerate([0, 1, 4]))
    free = draw(logits, sampling)
    assert [ids[row] for row in (2, 3, 5)] == [free[row] for row in (2, 3, 5)]
