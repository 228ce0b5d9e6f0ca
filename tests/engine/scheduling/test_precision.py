"""When steps take the narrower weights, and when they no longer do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.scheduling.budget import Pace
from engine.scheduling.cost import Profile, Work
from engine.scheduling.plan import Plan
from engine.scheduling.precision import CALM_SECONDS, MOST_CALM
from engine.scheduling.sequence import Sequence
from engine.scheduling.tenants import Tenant
from tests.engine.scheduling.bench import LINEAR, Bench

# Half of what LINEAR takes.
HALF = Profile((1, 1001), (0.0005, 0.5005), 0.0, 0.0, 0.0)
LONG = list(range(100))


def bench(**options: Any) -> Bench:
    return Bench(pages=400, budget=64, profile=LINEAR, busy_profile=HALF, **options)


def wait(bench: Bench, seconds: float) -> bool:
    """Let time pass, then step; whether that step is a busy one."""
    bench.clock.time += seconds
    return bench.step().busy


def late_prompt(bench: Bench, **options: Any) -> Sequence:
    """One that was let in, and of which a part is still to come after two seconds."""
    prompt = [1000 * bench.count + n for n in LONG]
    (sequence,) = bench.add(prompt, max_tokens=60, arrival=bench.clock.time, **options)
    bench.step()
    bench.clock.time += 2
    return sequence


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


@pytest.mark.parametrize("others", [0, 1])
def test_a_prompt_that_takes_long_by_itself_does_not(others: int) -> None:
    """Ten seconds, most of them for the pages before its chunks."""
    costly = replace(LINEAR, prefill_page_seconds=2e-5)
    load = Bench(pages=2000, budget=64, profile=costly, busy_profile=HALF)
    for _ in range(others):
        load.add([1, 2, 3], max_tokens=1000, arrival=0.0)
    (prompt,) = load.add(list(range(2000)), arrival=0.0)
    while not prompt.generated:
        plan = load.step()
        assert not plan.busy or load.clock.time > 20
        load.clock.time += plan.predicted
    assert load.clock.time > 10


def test_who_waits_for_room_makes_steps_busy() -> None:
    load = bench(running=1)
    load.add([1, 2, 3], max_tokens=60, arrival=0.0)
    load.add([4, 5, 6], max_tokens=60, arrival=0.0)
    assert not load.step().busy
    assert wait(load, 2.0)


def test_it_counts_whoever_heads_the_queue() -> None:
    load = bench(running=1)
    load.add([1, 2, 3], max_tokens=200, arrival=0.0)
    load.add([4, 5, 6], tenant="batches", priority=-1000, arrival=0.0)
    assert not load.step().busy
    load.add([7, 8, 9], tenant="guest", arrival=0.0)
    assert not load.step().busy
    for priority in range(1, 5):
        load.add([7, 8, 9], tenant="guest", arrival=0.0, priority=priority)
        busy = wait(load, 0.5)
    assert busy


def test_what_may_take_its_time_is_no_load() -> None:
    load = bench(running=1)
    late_prompt(load, priority=-1)
    late_prompt(load, priority=-1)
    assert not load.step().busy
    assert not wait(load, 60.0)


def test_who_waits_for_itself_is_no_load() -> None:
    load = bench()
    load.scheduler.queue.configure({"one": Tenant(id="one", max_running=1)})
    for _ in range(2):
        load.add([1, 2, 3], max_tokens=60, arrival=0.0, tenant="one")
    while load.scheduler.has_work:
        assert not wait(load, 0.5)


@pytest.mark.parametrize("steps", [0, 1])
def test_who_was_set_aside_has_not_been_kept(steps: int) -> None:
    load = bench()
    (sequence,) = load.add(LONG, max_tokens=60, arrival=0.0)
    for _ in range(steps):
        load.step()
    load.scheduler.pause(sequence)
    load.clock.time += 60
    load.scheduler.unpause(sequence)
    assert not load.step().busy


def test_who_had_to_make_way_has() -> None:
    load = bench()
    sequence = late_prompt(load)
    load.scheduler._preempt(sequence, Plan(0), "for the test")
    assert load.step().busy


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
        prompt = late_prompt(load)
        while not prompt.generated:
            assert load.step().busy
        assert wait(load, calm - 1)
        assert not wait(load, 2)
        calm = min(2 * calm, MOST_CALM)
    load.clock.time += MOST_CALM + 1
    load.step()
    prompt = late_prompt(load)
    while not prompt.generated:
        assert load.step().busy
    assert not wait(load, CALM_SECONDS + 1)


def test_an_idle_server_is_calm() -> None:
    load = bench()
    late_prompt(load)
    assert load.step().busy
    load.drain()
    load.scheduler.plan()
    assert not load.scheduler.cost.busy


def test_a_slow_spell_is_forgotten_while_busy() -> None:
    """What exact steps would take is reckoned from what busy ones take now."""
    load = bench(pace=Pace(target=0.0085))
    cost, work = load.scheduler.cost, Work(decodes=8)
    for _ in range(20):
        cost.observe(work, 0.016)
    assert cost.predict_quiet(work) > 0.0085
    cost.busy = True
    for _ in range(20):
        cost.observe(work, 0.004, busy=True)
    assert cost.predict_quiet(work) == pytest.approx(0.008)


def test_each_set_of_weights_is_learned_about_by_itself() -> None:
    cost, work = bench().scheduler.cost, Work(decodes=8)
    for _ in range(20):
        cost.observe(work, 0.012)
        cost.observe(work, 0.006, busy=True)
    quiet = cost.predict(work)
    cost.busy = True
    assert abs(quiet - 0.012) < 1e-6
    assert abs(cost.predict(work) - 0.006) < 1e-6
