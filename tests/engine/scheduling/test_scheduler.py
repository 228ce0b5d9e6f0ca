"""The scheduler: one rule for prefill, decode, prefix hits and recomputation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import ConfigError
from engine.scheduling.budget import Pace
from engine.scheduling.plan import Plan, StepResult
from engine.scheduling.sequence import Sequence, State
from tests.audit import audit
from tests.engine.scheduling.bench import LINEAR, Bench, counts, generated
from tests.mock import EOS, continuation


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_of_whole_pages() -> None:
    bench = Bench(budget=10)
    (sequence,) = bench.add(list(range(21)))
    assert [counts(bench.step()) for _ in range(3)] == [[8], [8], [5]]
    assert sequence.generated == 1


def test_the_batch_has_to_hold_everybody_and_a_page() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens is 7"):
        Bench(budget=7, running=4)


def test_decodes_come_before_prefill_and_share_the_step() -> None:
    bench = Bench(budget=9)
    bench.add([1, 2, 3], max_tokens=8)
    bench.step()
    bench.add(list(range(50, 70)))
    assert counts(bench.step()) == [1, 8]


def test_prefill_beside_decodes_keeps_to_the_target() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR, pace=Pace(target=0.0175))
    bench.add([1, 2, 3], max_tokens=9)
    assert counts(bench.step()) == [3]
    bench.add(list(range(100, 140)))
    assert counts(bench.step()) == [1, 12]  # 13 of 14 ms: a fifth is kept back


def test_a_page_gets_on_whatever_it_takes() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR, pace=Pace(target=0.001))
    bench.add([1, 2, 3], max_tokens=9)
    bench.step()
    bench.add(list(range(100, 140)))
    bench.add(list(range(200, 240)))
    assert counts(bench.step()) == [1, 4]


def test_a_request_can_want_its_tokens_sooner() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR, pace=Pace(target=0.060))
    bench.add([1, 2, 3], max_tokens=9, target_itl=0.025)
    bench.step()
    bench.add(list(range(100, 140)))
    assert counts(bench.step()) == [1, 16]


def test_without_decodes_a_step_is_still_bounded() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR, pace=Pace(longest=0.030))
    bench.add(list(range(60)))
    assert counts(bench.step()) == [28]


def test_without_a_target_prompts_hardly_disturb() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR)
    bench.add([1, 2, 3], max_tokens=9)
    bench.step()
    bench.add(list(range(100, 160)))
    assert counts(bench.step()) == [1, 12]  # within 15 ms


def test_overdue_prompts_disturb_more() -> None:
    bench = Bench(pages=200, budget=64, running=24, profile=LINEAR)
    for number in range(21):
        bench.add([number] * 3, max_tokens=20)
    while len(bench.scheduler.decoding) < 21:
        bench.step()
    bench.add(list(range(100, 200)))
    assert counts(bench.step()) == [1] * 21 + [8]  # within 1.4 times 21 ms
    bench.clock.time += 1.5
    assert counts(bench.step()) == [1] * 21 + [24]


def test_what_is_beyond_a_tenants_share_is_never_overdue() -> None:
    bench = Bench(pages=200, budget=64, running=24, profile=LINEAR)
    for number in range(21):
        bench.add([number] * 3, max_tokens=20, tenant=f"guest {number % 3}")
    while len(bench.scheduler.decoding) < 21:
        bench.step()
    for _ in range(3):
        bench.add(list(range(100, 200)), tenant="guest 0")
    bench.step()
    bench.clock.time += 1.5
    assert sum(chunk.count for chunk in bench.step().chunks) == 8


def test_a_short_prompt_passes_a_long_one() -> None:
    bench = Bench(pages=64, budget=16, running=4)
    bench.add(list(range(100, 180)), arrival=0.0)
    bench.step()
    (short,) = bench.add([1, 2, 3], arrival=0.0)
    assert counts(bench.step()) == [3, 12]
    assert short.generated == 1


def test_a_long_prompt_ages_and_is_not_passed_for_ever() -> None:
    bench = Bench(pages=200, budget=16, running=12)
    (long,) = bench.add(list(range(100, 140)))
    for number in range(60):
        bench.clock.time += 0.1
        bench.add([number] * 12, max_tokens=1, arrival=bench.clock.time)
        bench.step()
    assert long.generated > 0


def test_generation_equals_the_model_whatever_the_chunking() -> None:
    prompt = list(range(30))
    for budget in (8, 9, 16, 64):
        bench = Bench(budget=budget)
        (sequence,) = bench.add(prompt, max_tokens=9)
        bench.drain()
        assert generated(sequence) == continuation(prompt, 9)
        assert sequence.finish_reason == "length"


def test_nobody_makes_way_whose_last_token_is_on_its_way() -> None:
    bench = Bench(pages=3)
    for _ in range(20):
        bench.scheduler.lengths.record(1)  # both are let in, though they do not fit
    bench.add(list(range(7)), max_tokens=4)
    (short,) = bench.add([50, 51, 52], max_tokens=2)
    bench.step()
    plan = bench.scheduler.plan()
    assert bench.scheduler.plan().is_empty, "the first needs a third page, which comes anyway"
    bench.scheduler.commit(plan, bench.execute(plan))
    assert short.state is State.FINISHED
    assert (short.generated, short.preemptions) == (2, 0)
    bench.drain()


def test_admission_leaves_room_for_what_is_to_come() -> None:
    bench = Bench(pages=9, budget=64)
    sequences = [bench.add([i] * 9, max_tokens=12)[0] for i in range(3)]
    bench.drain()
    assert bench.scheduler.preemptions == 0
    assert all(s.generated == 12 for s in sequences)


def test_a_full_pool_preempts_and_output_is_unchanged() -> None:
    bench = Bench(pages=9, budget=64)
    bench.expect_short_outputs()
    prompts = [[i] * 9 for i in range(3)]
    sequences = [bench.add(p, max_tokens=12)[0] for p in prompts]
    bench.drain()
    assert bench.scheduler.preemptions > 0
    assert sequences[0].preemptions == 0
    assert [generated(s) for s in sequences] == [continuation(p, 12) for p in prompts]


def test_a_lower_priority_makes_room_for_a_higher_one() -> None:
    for first, second in ((-1, 1), (1, -1)):
        bench = Bench(pages=6, budget=64)
        bench.expect_short_outputs()
        (one,) = bench.add([1] * 8, max_tokens=10, priority=first)
        (other,) = bench.add([2] * 8, max_tokens=10, priority=second)
        bench.drain()
        low, high = (one, other) if first < second else (other, one)
        assert (low.preemptions > 0, high.preemptions) == (True, 0)


def test_a_step_scores_few_rows_whoever_asks() -> None:
    bench = Bench(pages=400, budget=512, running=20)
    for number in range(20):
        bench.add([number] * 30, prompt_logprobs=0, max_tokens=2)
    while bench.scheduler.has_work:
        plan = bench.step()
        assert sum(c.rows - c.sample for c in plan.chunks) <= 64


def test_higher_priority_is_admitted_first_then_first_come() -> None:
    bench = Bench(running=1)
    order = [bench.add([i], priority=p)[0] for i, p in ((1, 0), (2, 5), (3, 0))]
    ended: list[Sequence] = []
    while bench.scheduler.has_work:
        bench.step()
        ended += [s for s in order if s.state is State.FINISHED and s not in ended]
    assert ended == [order[1], order[0], order[2]]


def test_who_is_due_first_is_admitted_first() -> None:
    bench = Bench(running=1)
    (late,), (soon,), (never,) = (
        bench.add([1], deadline=25.0), bench.add([2], deadline=20.0), bench.add([3])
    )  # fmt: skip
    assert list(bench.scheduler.queue) == [soon, late, never]


def test_tokens_are_not_sampled_while_a_prompt_is_incomplete() -> None:
    bench = Bench(budget=8)
    (sequence,) = bench.add(list(range(16)))
    plan = bench.step()
    assert (plan.chunks[0].rows, plan.chunks[0].sample, sequence.generated) == (0, False, 0)


def test_the_end_token_stops_unless_ignored() -> None:
    for ignore, reason, count in ((False, "stop", 1), (True, "length", 3)):
        bench = Bench()
        bench.executor.choose = lambda _: EOS
        (sequence,) = bench.add([1], max_tokens=3, ignore_eos=ignore)
        bench.drain()
        assert (sequence.finish_reason, sequence.generated) == (reason, count)


def test_a_stop_token_is_named_and_waits_for_min_tokens() -> None:
    bench = Bench()
    bench.executor.choose = lambda _: 42
    (sequence,) = bench.add([1], max_tokens=9, stop_token_ids=(42,), min_tokens=3)
    bench.drain()
    assert (sequence.finish_reason, sequence.stop_reason, sequence.generated) == ("stop", 42, 3)


def test_a_result_for_an_aborted_sequence_is_ignored() -> None:
    bench = Bench()
    (gone,), (stays,) = bench.add([1, 2]), bench.add([3, 4])
    plan = bench.scheduler.plan()
    result = bench.execute(plan)
    bench.scheduler.finish(gone, "abort")
    assert bench.scheduler.commit(plan, result) == [stays]
    assert gone.generated == 0
    audit(bench.scheduler)


def test_a_step_can_be_planned_while_another_runs() -> None:
    bench = Bench(pages=64)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    sequences = [bench.add(p, max_tokens=6)[0] for p in prompts]
    flying = [bench.scheduler.plan()]
    results = [bench.execute(flying[0])]
    while flying:
        following = bench.scheduler.plan()
        if not following.is_empty:
            flying.append(following)
            results.append(bench.execute(following))
        audit(bench.scheduler)
        bench.scheduler.commit(flying.pop(0), results.pop(0))
    assert [generated(s) for s in sequences] == [continuation(p, 6) for p in prompts]
    # Nothing is drawn past the end, whose place is known; one step makes all the first tokens.
    assert len(bench.executor.plans) == 6


def test_pages_of_a_step_in_flight_are_not_given_away() -> None:
    bench = Bench(pages=4)
    (sequence,) = bench.add([1, 2, 3], max_tokens=9)
    plan = bench.scheduler.plan()
    pages, result = list(sequence.pages), bench.execute(plan)
    bench.scheduler.finish(sequence, "abort")
    assert bench.scheduler.pool.used == len(pages)
    bench.scheduler.commit(plan, result)
    assert bench.scheduler.pool.used == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_sequence_that_is_set_aside_holds_nothing_and_goes_on_later(steps: int) -> None:
    bench = Bench()
    (aside,) = bench.add([1, 2, 3, 4, 5, 6], max_tokens=8)
    (other,) = bench.add([7, 8], max_tokens=8)
    for _ in range(steps):
        bench.step()
    bench.scheduler.pause(aside)
    bench.scheduler.pause(aside)
    audit(bench.scheduler)
    assert not aside.pages
    bench.drain()
    assert (other.finish_reason, aside.finish_reason) == ("length", None)
    bench.scheduler.unpause(aside)
    bench.drain()
    assert generated(aside) == continuation([1, 2, 3, 4, 5, 6], 8)


def test_a_sequence_that_is_set_aside_can_end() -> None:
    bench = Bench()
    (aside,) = bench.add([1, 2])
    bench.scheduler.pause(aside)
    bench.scheduler.finish(aside, "abort")
    bench.scheduler.unpause(aside)
    assert not bench.scheduler.has_work
    assert aside.state is State.FINISHED


def test_finishing_twice_changes_nothing() -> None:
    bench = Bench()
    (sequence,) = bench.add([1])
    bench.scheduler.finish(sequence, "abort")
    bench.scheduler.finish(sequence, "stop")
    assert sequence.finish_reason == "abort"


def test_decisions_say_what_was_done_and_why() -> None:
    bench = Bench(running=1)
    bench.add([1, 2])
    bench.add([3, 4])
    kinds = [(d.kind, d.request_id, d.reason) for d in bench.step().decisions]
    assert kinds == [("admit", "1", "0 pages known"), ("wait", "2", "batch full")]
    assert bench.step().decisions == []  # waiting for the same reason is not news


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps and aborts in a pool too small for them, audited at every point."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(pages=10, budget=7, running=3, cold_slots=6)
        self.bench.expect_short_outputs()
        self.sequences: list[Sequence] = []
        self.flying: list[tuple[Plan, StepResult]] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        n=st.integers(1, 3),
        scored=st.booleans(),
    )
    def arrive(
        self, prompt: list[int], max_tokens: int, priority: int, n: int, scored: bool
    ) -> None:
        scoring = {"prompt_logprobs": 0} if scored else {}
        self.sequences += self.bench.add(prompt, max_tokens, priority=priority, n=n, **scoring)

    @precondition(lambda self: len(self.flying) < 2 and self.bench.scheduler.has_work)
    @rule()
    def plan(self) -> None:
        plan = self.bench.scheduler.plan()
        assert not plan.is_empty or self.flying, "there was work, but nothing was planned"
        assert sum(counts(plan)) <= 7
        if not plan.is_empty:
            self.flying.append((plan, self.bench.execute(plan)))

    @precondition(lambda self: self.flying)
    @rule()
    def commit(self) -> None:
        self.bench.scheduler.commit(*self.flying.pop(0))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.bench.scheduler.finish(sequence, "abort")

    @invariant()
    def nothing_is_lost(self) -> None:
        audit(self.bench.scheduler)

    @invariant()
    def text_is_the_models(self) -> None:
        for sequence in self.sequences:
            made = generated(sequence)
            assert made == continuation(sequence.request.prompt_ids, len(made))

    def teardown(self) -> None:
        while self.flying:
            self.commit()
        self.bench.drain(2000)
        assert all(s.state is State.FINISHED for s in self.sequences)
        assert self.bench.scheduler.pool.used == 0
        for sequence in self.sequences:
            if sequence.finish_reason == "length":
                assert sequence.generated == sequence.request.max_tokens
                if sequence.wants_prompt_logprobs:
                    assert len(sequence.prompt_logprobs) == sequence.prompt_length


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
