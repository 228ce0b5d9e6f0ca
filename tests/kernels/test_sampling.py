"""Sampling: every filter against its definition, and draws that depend on nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kernels import sampling as sampling_module
from kernels.batch import Penalty, Sampling, counter_uniform
from kernels.cpu.native_backend import native_module, unavailable_reason
from kernels.cpu.native_sampling import NativeChooser
from kernels.sampling import Chooser, sample, torch_choose


def options(rows: int, **changes: Any) -> Sampling:
    values: dict[str, Any] = {
        "targets": np.full(rows, -1, np.int64),
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "uniform": np.linspace(0, 1, rows, endpoint=False) + 0.5 / max(rows, 1),
        "top_logprobs": np.full(rows, -1, np.int32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
    }
    for name, value in changes.items():
        scalar = isinstance(value, (int, float))
        values[name] = np.full(rows, value, values[name].dtype) if scalar else value
    return Sampling(**values)


def native_chooser() -> Chooser:
    native = native_module()
    if native is None or unavailable_reason() is not None:
        pytest.skip(f"native kernels: {unavailable_reason()}")
    return NativeChooser(native.Device(native.instruction_sets()[0], 2))


@pytest.fixture(params=["torch", "native"])
def choose(request: pytest.FixtureRequest) -> Chooser:
    """Both ways to pick a token have to mean the same."""
    return torch_choose if request.param == "torch" else native_chooser()


def frequencies(
    logits: torch.Tensor, choose: Chooser, draws: int = 4000, **changes: Any
) -> torch.Tensor:
    """How often each token is drawn when the uniform numbers sweep [0, 1) evenly."""
    rows = logits.expand(draws, -1).contiguous()
    ids = sample(rows, options(draws, **changes), choose).ids
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1]) / draws


LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, -3.0])


def filtered(keep: list[int], temperature: float = 1.0) -> torch.Tensor:
    probabilities = torch.softmax(LOGITS / temperature, -1)
    kept = torch.zeros_like(probabilities)
    kept[keep] = probabilities[keep]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, filtered([0, 1, 2, 3, 4, 5])),
        ({"temperature": 0.5}, filtered([0, 1, 2, 3, 4, 5], 0.5)),
        ({"top_k": 2}, filtered([0, 2])),
        ({"top_k": 100}, filtered([0, 1, 2, 3, 4, 5])),
        ({"top_p": 0.7}, filtered([0, 2])),
        ({"top_p": 0.01}, filtered([0])),
        ({"min_p": 0.3}, filtered([0, 2])),
        ({"top_k": 3, "top_p": 0.8}, filtered([0, 2])),
        ({"min_p": 0.2, "top_p": 0.9}, filtered([0, 2, 1])),
    ],
)
def test_draws_follow_the_filtered_distribution(
    changes: dict[str, float], expected: torch.Tensor, choose: Chooser
) -> None:
    assert torch.allclose(frequencies(LOGITS, choose, **changes), expected, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1e-9},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_k": 700, "top_p": 0.8, "min_p": 1e-4},
    ],
)
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_native_and_torch_draw_the_same_tokens(changes: dict[str, float], spread: float) -> None:
    """Over a large vocabulary, flat and peaked; only ties at a boundary may differ."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(200, 5003, generator=generator) * spread
    settings = options(200, **changes)
    drawn = [sample(logits, settings, c).ids for c in (torch_choose, native_chooser())]
    same = sum(a == b for a, b in zip(*drawn, strict=True))
    assert same >= 197, same


def test_forbidden_tokens_are_never_drawn(choose: Chooser) -> None:
    logits = torch.full((400, 50), float("-inf"))
    logits[:, [3, 40]] = torch.tensor([0.0, 1.0])
    assert set(sample(logits, options(400, temperature=2.0), choose).ids) == {3, 40}


def test_the_first_of_equal_logits_is_the_likeliest(choose: Chooser) -> None:
    logits = torch.zeros(1, 100)
    logits[0, [17, 60]] = 1.0
    assert sample(logits, options(1, temperature=0), choose).ids == [17]


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 300}])
def test_candidates_are_only_a_short_cut(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorting few candidates draws what sorting the whole vocabulary draws."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    drawn = []
    for candidates in (4, 100_000):
        monkeypatch.setattr(sampling_module, "CANDIDATES", candidates)
        drawn.append(sample(logits.expand(300, -1), options(300, **changes)).ids)
    assert drawn[0] == drawn[1]


def test_temperature_zero_takes_the_likeliest(choose: Chooser) -> None:
    assert sample(LOGITS[None], options(1, temperature=0), choose).ids == [0]


def test_greedy_and_drawn_rows_mix(choose: Chooser) -> None:
    temperature = np.array([0, 1, 0], np.float32)
    uniform = np.array([0.99, 0.9999, 0.99])
    rows = LOGITS.expand(3, -1).contiguous()
    ids = sample(rows, options(3, temperature=temperature, uniform=uniform), choose).ids
    assert ids == [0, 5, 0]


def test_a_row_does_not_depend_on_its_company(choose: Chooser) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 500, generator=generator)
    together = sample(logits, options(8, top_p=0.9, top_k=50), choose).ids
    for row in range(8):
        alone = options(1, top_p=0.9, top_k=50, uniform=options(8).uniform[row : row + 1])
        assert sample(logits[row : row + 1], alone, choose).ids == [together[row]]


def test_bias_forces_and_forbids() -> None:
    forced = options(2, temperature=0, bias_rows=[0, 1], bias_ids=[3, 0])
    forced.bias_values = [100.0, float("-inf")]
    assert sample(LOGITS.expand(2, -1), forced).ids == [3, 2]


def penalized(logits: list[float], **changes: float) -> list[float]:
    """Which logits a penalty leaves, seen through the order of greedy choices."""
    history = Penalty(
        0,
        np.array([2, 0, 1], np.int32),
        np.array([True, False, True]),
    )
    settings = options(1, temperature=0, **changes)
    settings.penalties = [history]
    row = torch.tensor([logits])
    return sampling_module._adjust(row, settings)[0].tolist()


def test_penalties_follow_their_definitions() -> None:
    assert penalized([1.0, 1.0, -1.0], repetition_penalty=2.0) == [0.5, 1.0, -2.0]
    assert penalized([1.0, 1.0, 1.0], frequency_penalty=0.5) == [0.0, 1.0, 0.5]
    assert penalized([1.0, 1.0, 1.0], presence_penalty=0.5) == [0.5, 1.0, 0.5]


def test_logprobs_are_of_the_raw_distribution() -> None:
    settings = options(3, temperature=0, top_logprobs=np.array([2, -1, 0], np.int32))
    settings.bias_rows, settings.bias_ids, settings.bias_values = [0], [5], [100.0]
    samples = sample(LOGITS.expand(3, -1), settings)
    expected = torch.log_softmax(LOGITS, -1)
    assert samples.ids[0] == 5
    assert samples.logprobs[0] == pytest.approx(float(expected[5]))
    assert [token for token, _ in samples.top[0]] == [0, 2]
    assert samples.top[0][0][1] == pytest.approx(float(expected[0]))
    assert samples.logprobs[1] is None
    assert samples.logprobs[2] == pytest.approx(float(expected[0]))
    assert samples.top[1:] == [[], []]


def test_given_targets_are_scored_not_drawn() -> None:
    settings = options(2, targets=np.array([4, -1]), temperature=0, top_logprobs=0)
    samples = sample(LOGITS.expand(2, -1), settings)
    assert samples.ids == [4, 0]
    assert samples.logprobs[0] == pytest.approx(float(torch.log_softmax(LOGITS, -1)[4]))


def test_no_rows_give_no_samples() -> None:
    samples = sample(torch.empty(0, 6), options(0))
    assert (samples.ids, samples.logprobs, samples.top) == ([], [], [])


def test_counters_give_even_independent_draws() -> None:
    seeds = np.arange(100, dtype=np.uint64).repeat(100)
    draws = counter_uniform(seeds, np.tile(np.arange(100), 100))
    assert len(set(draws.tolist())) == len(draws)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(1000, abs=120)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    again = counter_uniform(seeds[5:6], np.array([5]))
    assert again[0] == draws[5]


def masked(settings: Sampling, rows: list[int], allowed: np.ndarray[Any, Any]) -> Sampling:
    """`settings` with masks for `rows`; `allowed` bool `[len(rows), vocab]`."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    masks = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    return replace(settings, mask_rows=rows, masks=masks)


@pytest.mark.parametrize("vocab", [64, 301])
def test_only_what_a_mask_allows_is_drawn(choose: Chooser, vocab: int) -> None:
    """Greedy and drawn rows; masks with words of all bits, of none, and of some; and one token that
    is allowed alone, whatever the bias."""
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    allowed = np.random.default_rng(5).random((20, vocab)) < 0.1
    allowed[:, 32:64] = np.arange(20)[:, None] % 2 == 0
    allowed[19] = np.arange(vocab) == 7
    settings = options(
        40,
        temperature=np.where(np.arange(40) % 3, 1.0, 0.0).astype(np.float32),
        bias_rows=[38],
        bias_ids=[8],
        bias_values=[100.0],
    )
    rows = list(range(0, 40, 2))
    ids = sample(logits, masked(settings, rows, allowed), choose).ids
    assert all(allowed[number, ids[row]] for number, row in enumerate(rows))
    assert ids[38] == 7
    free = sample(logits, settings, choose).ids
    assert ids[1::2] == free[1::2]
    assert torch.equal(logits, before)


def test_native_and_torch_edit_the_same_rows_alike() -> None:
    """Biases, penalties and masks on some rows, greedy and drawn; the logits stay as they are."""
    generator = torch.Generator().manual_seed(11)
    random = np.random.default_rng(11)
    rows, vocab = 9, 300
    logits = torch.randn(rows, vocab, generator=generator) * 3
    before = logits.clone()
    settings = options(
        rows,
        temperature=np.where(np.arange(rows) % 2, 0.8, 0.0).astype(np.float32),
        top_k=np.where(np.arange(rows) % 3, 0, 20).astype(np.int32),
        repetition_penalty=random.uniform(1.0, 1.8, rows).astype(np.float32),
        presence_penalty=random.uniform(-1.0, 1.0, rows).astype(np.float32),
        frequency_penalty=random.uniform(-0.5, 0.5, rows).astype(np.float32),
    )
    for row in (1, 2, 6):
        counts = random.integers(0, 3, vocab).astype(np.int32)
        settings.penalties = [
            *settings.penalties,
            Penalty(row, counts, (counts > 0) | (random.random(vocab) < 0.2)),
        ]
    settings.bias_rows, settings.bias_ids = [2, 2, 5, 8], [7, 7, 3, 1]
    settings.bias_values = [4.0, 2.0, 50.0, float("-inf")]
    settings = masked(settings, [2, 3, 6], random.random((3, vocab)) < 0.3)
    found = [sample(logits, settings, choose).ids for choose in (torch_choose, native_chooser())]
    assert found[0] == found[1]
    assert found[0][5] == 3
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 300},
        {"min_p": 0.05},
        {"top_k": 900, "top_p": 0.5, "min_p": 0.01},
    ],
    ids=str,
)
def test_native_and_torch_draw_alike_from_flat_distributions(filters: dict[str, float]) -> None:
    """Thousands of likely tokens, so that the draw has to count far down."""
    generator = torch.Generator().manual_seed(12)
    logits = torch.randn(40, 5000, generator=generator)
    if "top_k" not in filters:  # which of equals torch's topk keeps is not defined
        logits[20:] = (logits[20:] * 4).round() / 4
    settings = options(40, **filters)
    found = [sample(logits, settings, choose).ids for choose in (torch_choose, native_chooser())]
    assert found[0] == found[1]
