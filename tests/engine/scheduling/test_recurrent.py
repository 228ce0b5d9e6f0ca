"""Sharing by snapshots: what a prompt takes over, waits for and keeps."""

from __future__ import annotations

from hypothesis import settings

from engine.scheduling.plan import Move, Plan
from engine.scheduling.recurrent import STRIDE
from engine.scheduling.sequence import Sequence
from tests.engine.scheduling.bench import SIZE, Bench, counts, generated
from tests.engine.scheduling.test_scheduler import SchedulerMachine
from tests.mock import continuation

PROMPT = list(range(22))


def bench(**options: int) -> Bench:
    return Bench(**({"pages": 64, "budget": 64, "running": 8, "snapshots": 8} | options))


def resumed(plan: Plan) -> list[tuple[int, int]]:
    return [(place, slot) for kind, place, slot in plan.moves if kind is Move.RESUME]


def kept(plan: Plan) -> list[tuple[int, bool]]:
    return [(kept.pages, kept.wanted) for _, kept in plan.kept]


def test_a_repeated_prompt_goes_on_from_its_last_page() -> None:
    house = bench()
    (first,) = house.add(PROMPT)
    plan = house.scheduler.plan()
    assert kept(plan) == [(5, True)]
    house.scheduler.commit(plan, house.execute(plan))
    house.drain()
    (second,) = house.add(PROMPT)
    plan = house.step()
    assert resumed(plan) == [(8, second.slot)]
    assert (second.cached, counts(plan)) == (20, [2])
    house.drain()
    assert generated(second) == generated(first) == continuation(PROMPT, 4)


def test_a_prompt_of_one_page_keeps_and_finds_nothing() -> None:
    house = bench()
    for _ in range(2):
        (sequence,) = house.add(PROMPT[:SIZE])
        plan = house.step()
        assert (sequence.cached, plan.kept, plan.moves) == (0, [], [])
        house.drain()


def test_pages_without_a_state_are_computed_again_and_a_state_is_kept_where_they_end() -> None:
    house = bench()
    house.add(PROMPT)
    house.drain()
    (second,) = house.add([*PROMPT[:13], *[90] * 9])
    plan = house.scheduler.plan()
    assert (second.cached, counts(plan), kept(plan)) == (0, [12], [(3, True)])
    house.scheduler.commit(plan, house.execute(plan))
    house.drain()
    (third,) = house.add([*PROMPT[:13], *[80] * 9])
    house.step()
    assert third.cached == 12


def test_choices_wait_for_the_state_of_the_first() -> None:
    house = bench()
    choices = house.add(PROMPT, n=4)
    assert counts(house.step()) == [22]
    plan = house.step()
    assert counts(plan) == [1, 2, 2, 2]
    assert len(resumed(plan)) == 3
    house.drain()
    assert {tuple(generated(c)) for c in choices} == {tuple(continuation(PROMPT, 4))}


def test_others_go_on_when_the_first_gives_up_what_it_promised() -> None:
    house = bench()
    first, second = house.add(PROMPT, n=2)
    plan = house.scheduler.plan()
    result = house.execute(plan)
    house.scheduler.finish(first, "abort")
    house.scheduler.commit(plan, result)
    house.drain()
    assert generated(second) == continuation(PROMPT, 4)


def test_a_step_that_fails_has_kept_nothing() -> None:
    house = bench()
    house.add(PROMPT)
    plan = house.scheduler.plan()
    for sequence in house.scheduler.discard(plan):
        house.scheduler.finish(sequence, "error")
    house.scheduler.prefixes.snapshots.audit([])  # type: ignore[attr-defined]
    (second,) = house.add(PROMPT)
    house.step()
    assert second.cached == 0


def test_without_places_every_prompt_is_computed_and_nobody_waits() -> None:
    house = bench(snapshots=0)
    choices = house.add(PROMPT, n=3)
    assert counts(house.step()) == [22, 22, 20]
    house.drain()
    assert {tuple(generated(c)) for c in choices} == {tuple(continuation(PROMPT, 4))}


def test_when_every_place_is_being_filled_nobody_waits_for_more() -> None:
    house = bench(snapshots=1)
    one, two, again = (house.add(prompt)[0] for prompt in (PROMPT, [50, *PROMPT], [50, *PROMPT]))
    plan = house.scheduler.plan()
    assert len(plan.kept) == 1
    house.scheduler.commit(plan, house.execute(plan))
    house.drain()
    for sequence in (one, two, again):
        assert generated(sequence) == continuation(sequence.request.prompt_ids, 4)


def test_an_answer_keeps_the_state_that_it_has_last_come_to() -> None:
    house = bench(pages=128)
    (first,) = house.add(PROMPT, max_tokens=3 * STRIDE, ignore_eos=True)
    house.drain()
    (second,) = house.add([*first.tokens, 1, 2])
    house.step()
    # The last whole stride, not all of them.
    assert second.cached == (len(first.tokens) - 1) // STRIDE * STRIDE
    assert len(house.scheduler.prefixes.snapshots) == 3  # type: ignore[attr-defined]


def test_states_go_with_their_pages() -> None:
    house = bench(pages=8, running=2)
    house.add(PROMPT)
    house.drain()
    house.add([99 - n for n in range(24)])
    house.drain()
    (third,) = house.add(PROMPT)
    house.step()
    assert third.cached == 0
    house.drain()


def test_pages_of_the_cold_tier_are_taken_up_to_a_state() -> None:
    house = bench(pages=8, running=2, cold_slots=16)
    house.add(PROMPT)
    house.drain()
    house.add([99 - n for n in range(24)])
    house.drain()
    (third,) = house.add(PROMPT)
    plan = house.step()
    assert third.cached == 20
    kinds = [kind for kind, _, _ in plan.moves]
    assert kinds.count(Move.RESTORE) >= 1
    assert kinds.count(Move.RESUME) == 1
    house.drain()
    assert generated(third) == continuation(PROMPT, 4)


def test_states_go_when_the_cold_tier_forgets_their_pages() -> None:
    house = bench(pages=8, running=2, cold_slots=3)
    for number in range(3):
        house.add([50 * number + n for n in range(24)])
        house.drain()
    names = house.scheduler.prefixes
    kept, _ = names.states
    assert kept == 1, "those of the first two prompts lie behind pages that are gone"
    house.scheduler.prefixes.forget()
    assert names.states == (0, 8)


def test_a_long_prompt_that_makes_way_goes_on_from_its_last_piece() -> None:
    house = bench(budget=16)
    (sequence,) = house.add(list(range(60)))
    for _ in range(2):
        house.step()
    house.scheduler.pause(sequence)
    house.scheduler.unpause(sequence)
    house.step()
    assert sequence.shared * SIZE >= 24
    house.drain()
    assert generated(sequence) == continuation(list(range(60)), 4)


def test_a_prompt_whose_positions_are_scored_shares_nothing() -> None:
    house = bench()
    house.add(PROMPT)
    house.drain()
    (scored,) = house.add(PROMPT, prompt_logprobs=0)
    house.drain()
    assert scored.cached == 0
    assert len(scored.prompt_logprobs) == len(PROMPT)


class RecurrentMachine(SchedulerMachine):
    """The same with a model that keeps states, and few places for them."""

    places = 2

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(pages=10, budget=7, running=3, cold_slots=6, snapshots=self.places)
        self.bench.expect_short_outputs()
        self.sequences: list[Sequence] = []


class TestRecurrentMachine(RecurrentMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
