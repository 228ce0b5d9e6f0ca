"""The cost model: a monotone profile, corrected by medians within bounds."""

from __future__ import annotations

import pytest

from engine.scheduling.cost import CostModel, Profile, Work

PROFILE = Profile((1, 11), (0.010, 0.110), 0.001, 0.002, 0.0001)


def test_a_profile_is_forced_to_rise() -> None:
    profile = Profile.measured([(4, 0.2), (1, 0.1), (2, 0.3)], -1.0, 0.5, 0.0)
    assert (profile.rows, profile.row_seconds) == ((1, 2, 4), (0.1, 0.3, 0.3))
    assert (profile.sample_seconds, profile.page_seconds) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(prefill=1), 0.010),
        (Work(prefill=6), 0.060),
        (Work(prefill=21), 0.210),
        (Work(decodes=2), 0.021),
        (Work(decodes=1, pages=3), 0.016),
        (Work(prefill=1, prefill_pages=10), 0.011),
        (Work(), 0.0),
    ],
)
def test_a_step_is_the_sum_of_its_parts(work: Work, seconds: float) -> None:
    assert CostModel(PROFILE).predict(work) == pytest.approx(seconds)


def test_one_slow_step_moves_nothing_and_many_do() -> None:
    cost, work = CostModel(PROFILE), Work(decodes=1)
    for seconds in (0.010, 0.010, 0.500, 0.010, 0.010):
        cost.observe(work, seconds)
    assert cost.predict(work) == pytest.approx(0.010)
    for _ in range(15):
        cost.observe(work, 0.015)
    assert cost.predict(work) == pytest.approx(0.015)
    assert cost.median_error < 0.35


def test_corrections_are_bounded() -> None:
    for taken, predicted in ((1.0, 0.020), (0.0001, 0.005)):
        cost = CostModel(PROFILE)
        for _ in range(20):
            cost.observe(Work(decodes=1), taken)
        assert cost.predict(Work(decodes=1)) == pytest.approx(predicted)


def test_kinds_of_steps_are_corrected_apart_and_unseen_ones_like_the_rest() -> None:
    cost = CostModel(PROFILE)
    for _ in range(5):
        cost.observe(Work(decodes=1), 0.015)
    for _ in range(20):
        cost.observe(Work(prefill=8), 0.080)
    assert cost.predict(Work(decodes=1)) == pytest.approx(0.015)
    assert cost.predict(Work(prefill=8)) == pytest.approx(0.080)
    assert cost.predict(Work(prefill=3)) == pytest.approx(0.030)


def test_a_prompt_alone_takes_its_steps() -> None:
    cost = CostModel(PROFILE)
    alone = cost.prefill_seconds(25, 10, 5)
    steps = [Work(prefill=10, prefill_pages=10 * pages) for pages in (0, 2)]
    steps.append(Work(prefill=5, sampled=1, prefill_pages=5 * 4))
    assert alone == pytest.approx(sum(map(cost.predict, steps))) == pytest.approx(0.254)
    assert cost.prefill_seconds(5, 10, 5) == cost.predict(Work(prefill=5, sampled=1))
