"""When steps take the narrower weights, and when they no longer do."""

from __future__ import annotations

from typing import Any

from engine.scheduling.budget import Pace
from engine.scheduling.cost import Profile, Work
from engine.scheduling.precision import CALM_SECONDS, MOST_CALM
from tests.engine.scheduling.bench import LINEAR, Bench

# Half of what LINEAR takes.
HALF = Profile((1, 1001), (0.0005, 0.5005), 0.0, 0.0, 0.0)
LONG = list(range(40))


def bench(**options: Any) -> Bench:
    return Bench(pages=400, budget=64, profile=LINEAR, busy_profile=HALF, **options)


def wait(bench: Bench, seconds: float) -> bool:
    """Let time pass, then step; whether that step is a busy one."""
    bench.clock.time += seconds
    return bench.step().busy


def late_prompt(bench: Bench, **options: Any) -> None:
    """One that has been waiting for two seconds."""
    bench.add(LONG, max_tokens=60, arrival=bench.clock.time - 2, **options)


def test_without_other_weights_every_step_is_exact() -> None:
    alone = Bench(pages=400, budget=64, profile=LINEAR)
    late_prompt(alone)
    assert not alone.step().busy


def test_a_prompt_that_others_have_kept_makes_steps_busy() -> None:
    load = bench()
    load.add(LONG, max_tokens=60, arrival=0.0)
    assert not load.step().busy
    late_prompt(load)
    plan = load.step()
    load.scheduler.cost.busy = False
    exact = load.scheduler.cost.predict(plan.work)
    assert plan.busy
    assert plan.predicted == exact / 2


def test_a_prompt_that_takes_long_by_itself_does_not() -> None:
    """3,000 tokens are three seconds' work."""
    load = Bench(pages=2000, budget=64, profile=LINEAR, busy_profile=HALF)
    load.add(list(range(3000)), arrival=0.0)
    assert not load.step().busy
    assert not wait(load, 5.0)
    assert wait(load, 5.0)


def test_who_waits_for_room_makes_steps_busy() -> None:
    load = bench(running=1)
    load.add([1, 2, 3], max_tokens=60, arrival=0.0)
    load.add([4, 5, 6], max_tokens=60, arrival=0.0)
    assert not load.step().busy
    assert wait(load, 2.0)


def test_what_may_take_its_time_is_no_load() -> None:
    load = bench(running=1)
    late_prompt(load, priority=-1)
    late_prompt(load, priority=-1)
    assert not load.step().busy
    assert not wait(load, 60.0)


def test_who_comes_back_has_not_been_kept() -> None:
    load = bench()
    (sequence,) = load.add(LONG, max_tokens=60, arrival=0.0)
    load.step()
    load.scheduler.pause(sequence)
    load.clock.time += 60
    load.scheduler.unpause(sequence)
    assert not load.step().busy


def test_decodes_that_would_miss_the_target_make_steps_busy() -> None:
    load = bench(running=16, pace=Pace(target=0.0085))
    for number in range(9):
        load.add([number] * 3, max_tokens=60, arrival=0.0)
    while len(load.scheduler.decoding) < 9:
        assert not load.step().busy
    assert load.step().busy


def test_steps_are_exact_again_once_it_has_been_calm() -> None:
    load = bench()
    late_prompt(load)
    assert load.step().busy
    assert wait(load, CALM_SECONDS - 1)
    assert not wait(load, 2)


def test_load_that_comes_back_at_once_has_to_stay_away_for_longer() -> None:
    load, calm = bench(running=40), CALM_SECONDS
    for _ in range(7):
        late_prompt(load)
        assert load.step().busy
        assert wait(load, calm - 1)
        assert not wait(load, 2)
        calm = min(2 * calm, MOST_CALM)
    load.clock.time += MOST_CALM + 1
    load.step()
    late_prompt(load)
    assert load.step().busy
    assert not wait(load, CALM_SECONDS + 1)


def test_each_set_of_weights_is_learned_about_by_itself() -> None:
    cost, work = bench().scheduler.cost, Work(decodes=8)
    for _ in range(20):
        cost.observe(work, 0.012)
        cost.observe(work, 0.006, busy=True)
    quiet = cost.predict(work)
    cost.busy = True
    assert abs(quiet - 0.012) < 1e-6
    assert abs(cost.predict(work) - 0.006) < 1e-6
    assert cost.predict_quiet(work) == quiet
