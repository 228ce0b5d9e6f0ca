"""The scheduler: one rule for prefill, decode, prefix hits and recomputation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import InvalidRequest, Overloaded
from engine.scheduling.pages import PagePool
from engine.scheduling.policy import Limits, admit, check_length
from engine.scheduling.scheduler import Plan, Scheduler, SchedulerLimits, StepResult
from engine.scheduling.sequence import Sequence, State
from engine.types import MonotonicClock, Request, SamplingParams
from tests.mock import EOS, MockExecutor, continuation, next_token

SIZE = 4


class Bench:
    """A scheduler with the mock model behind it."""

    def __init__(
        self, pages: int = 16, budget: int = 16, running: int = 4, beside: int | None = None
    ) -> None:
        limits = SchedulerLimits(budget, running, beside or budget)
        self.scheduler = Scheduler(PagePool(pages, SIZE), limits, MonotonicClock())
        self.executor = MockExecutor(pages, SIZE, next_token)
        self.count = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        priority: int = 0,
        n: int = 1,
        **params: Any,
    ) -> list[Sequence]:
        self.count += 1
        request = Request(
            id=str(self.count),
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(n=n, **params),
            max_tokens=max_tokens,
            seed=0,
            arrival=float(self.count),
            priority=priority,
            eos_token_ids=frozenset([EOS]),
        )
        sequences: list[Sequence] = []
        for index in range(n):
            leader = sequences[0] if sequences else None
            sequences.append(Sequence(request, index, fingerprint=b"", leader=leader))
            self.scheduler.add(sequences[-1])
        return sequences

    def execute(self, plan: Plan) -> StepResult:
        self.executor.fill(plan)
        return self.executor.run()

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        self.scheduler.commit(plan, self.execute(plan))
        self.scheduler.audit()
        return plan

    def drain(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def generated(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.prompt_length :]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    bench = Bench(budget=8)
    (sequence,) = bench.add(list(range(20)))
    counts = [[c.count for c in bench.step().chunks] for _ in range(3)]
    assert counts == [[8], [8], [4]]
    assert sequence.generated == 1


def test_decodes_come_before_prefill_and_share_the_step() -> None:
    bench = Bench(budget=8)
    bench.add([1, 2, 3], max_tokens=8)
    bench.step()
    bench.add(list(range(50, 70)))
    assert [c.count for c in bench.step().chunks] == [1, 7]


def test_prefill_is_held_back_only_while_somebody_decodes() -> None:
    bench = Bench(budget=8, beside=3)
    bench.add([1, 2, 3], max_tokens=2)
    assert [c.count for c in bench.step().chunks] == [3]
    bench.add(list(range(50, 70)))
    bench.add([7, 8])
    assert [c.count for c in bench.step().chunks] == [1, 3]
    assert [c.count for c in bench.step().chunks] == [8]


def test_a_row_of_a_long_prompt_counts_as_prefill_too() -> None:
    bench = Bench(pages=64, budget=16, beside=3, running=8)
    bench.add([1, 2, 3], max_tokens=8)
    bench.step()
    bench.add(list(range(50, 52)))
    for start in (60, 70, 80):
        bench.add(list(range(start, start + 9)))
    assert [c.count for c in bench.step().chunks] == [1, 2, 1]


def test_prefill_leaves_a_row_to_everyone_who_decodes() -> None:
    bench = Bench(pages=64, budget=6, beside=6, running=8)
    for start in (0, 10, 20):
        bench.add([start, start + 1], max_tokens=9)
    bench.step()
    bench.add(list(range(30, 60)), priority=1)
    for _ in range(2):
        assert sorted(c.count for c in bench.step().chunks) == [1, 1, 1, 3]


def test_generation_equals_the_model_whatever_the_chunking() -> None:
    prompt = list(range(30))
    for budget in (1, 3, 16, 64):
        bench = Bench(budget=budget)
        (sequence,) = bench.add(prompt, max_tokens=9)
        bench.drain()
        assert generated(sequence) == continuation(prompt, 9)
        assert sequence.finish_reason == "length"


def test_a_second_request_finds_the_first_ones_pages() -> None:
    bench = Bench()
    prompt = list(range(12))
    (first,) = bench.add(prompt)
    bench.drain()
    (second,) = bench.add(prompt)
    plan = bench.step()
    # 12 tokens are three full pages, but the last token is always computed.
    assert (second.cached, plan.chunks[0].count) == (8, 4)
    bench.drain()
    assert generated(second) == generated(first)


def test_output_pages_are_reused_by_the_next_turn_of_a_conversation() -> None:
    bench = Bench()
    (first,) = bench.add(list(range(8)), max_tokens=9)
    bench.drain()
    (second,) = bench.add([*first.tokens, 5])
    bench.step()
    assert second.cached == 16


def test_prompt_logprobs_bypass_the_cache_and_score_every_position() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.add(prompt)
    bench.drain()
    (sequence,) = bench.add(prompt, prompt_logprobs=1)
    bench.drain()
    assert sequence.cached == 0
    assert len(sequence.prompt_logprobs) == 10
    assert sequence.prompt_logprobs[0] is None
    assert all(p is not None for p in sequence.prompt_logprobs[1:])


def test_choices_of_one_request_share_the_prompts_pages() -> None:
    bench = Bench(pages=32, budget=32)
    prompt = list(range(16))
    choices = bench.add(prompt, n=4)
    assert len(bench.step().chunks) == 1  # the others wait for the first one's prompt
    bench.step()
    assert [c.cached for c in choices] == [0, 12, 12, 12]
    shared = {tuple(c.pages[:3]) for c in choices}
    assert len(shared) == 1


def test_followers_go_on_alone_when_their_leader_is_aborted() -> None:
    bench = Bench()
    leader, follower = bench.add(list(range(8)), n=2)
    bench.scheduler.finish(leader, "abort")
    bench.drain()
    assert generated(follower) == continuation(list(range(8)), 4)


def test_a_full_pool_preempts_the_latest_and_output_is_unchanged() -> None:
    bench = Bench(pages=9, budget=64)
    prompts = [[i] * 9 for i in range(3)]
    sequences = [bench.add(p, max_tokens=12)[0] for p in prompts]
    bench.drain()
    assert bench.scheduler.preemptions > 0
    assert sequences[0].preemptions == 0
    assert [generated(s) for s in sequences] == [continuation(p, 12) for p in prompts]


def test_a_lower_priority_makes_room_for_a_higher_one() -> None:
    bench = Bench(pages=6, budget=64)
    (low,) = bench.add([1] * 8, max_tokens=10, priority=-1)
    (high,) = bench.add([2] * 8, max_tokens=10, priority=1)
    bench.drain()
    assert (low.preemptions > 0, high.preemptions) == (True, 0)


def test_a_higher_priority_that_came_later_is_not_the_one_to_go() -> None:
    bench = Bench(pages=5, budget=64)
    (low,) = bench.add([1] * 5, max_tokens=12, priority=0)
    bench.step()
    (high,) = bench.add([2] * 6, max_tokens=6, priority=1)
    bench.drain()
    assert (low.preemptions > 0, high.preemptions) == (True, 0)
    assert generated(low) == continuation([1] * 5, 12)


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
    assert [bench.scheduler.waiting.index(s) for s in order] == [1, 0, 2]


def test_tokens_are_not_sampled_while_a_prompt_is_incomplete() -> None:
    bench = Bench(budget=4)
    (sequence,) = bench.add(list(range(8)))
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
    moved = bench.scheduler.commit(plan, result)
    assert [s for s, _ in moved] == [stays]
    assert gone.generated == 0
    bench.scheduler.audit()


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
    assert kinds == [("admit", "1", "0 cached tokens"), ("wait", "2", "batch full")]
    assert bench.step().decisions == []  # waiting for the same reason is not news


def test_length_rules() -> None:
    limits = Limits(context=10, max_waiting=2, max_waiting_tokens=100)
    assert check_length(4, None, limits) == 6
    assert check_length(4, 6, limits) == 6
    for prompt, tokens, param in ((10, None, "prompt"), (4, 7, "max_tokens")):
        with pytest.raises(InvalidRequest) as error:
            check_length(prompt, tokens, limits)
        assert (error.value.param, error.value.code) == (param, "context_length_exceeded")


def test_a_full_queue_refuses() -> None:
    bench = Bench()
    sequences = bench.add([1] * 60) + bench.add([2] * 30)
    with pytest.raises(Overloaded, match="2 sequences"):
        admit(sequences[0].request, sequences, Limits(100, 2, 1000))
    with pytest.raises(Overloaded, match="150 tokens") as error:
        admit(sequences[0].request, sequences, Limits(100, 9, 140))
    assert error.value.retry_after > 0


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps and aborts in a pool too small for them, audited at every point."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(pages=10, budget=7, running=3)
        self.sequences: list[Sequence] = []
        self.pending: tuple[Plan, StepResult] | None = None

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

    @precondition(lambda self: self.pending is None and self.bench.scheduler.has_work)
    @rule()
    def plan(self) -> None:
        plan = self.bench.scheduler.plan()
        assert plan.chunks, "there was work, but nothing was planned"
        assert sum(c.count for c in plan.chunks) <= 7
        self.pending = (plan, self.bench.execute(plan))

    @precondition(lambda self: self.pending is not None)
    @rule()
    def commit(self) -> None:
        assert self.pending is not None
        self.bench.scheduler.commit(*self.pending)
        self.pending = None
        self.bench.scheduler.audit()

    @precondition(lambda self: self.pending is None and self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.bench.scheduler.finish(sequence, "abort")

    @precondition(lambda self: self.pending is not None)
    @rule(data=st.data())
    def abort_in_flight(self, data: st.DataObject) -> None:
        assert self.pending is not None
        chunk = data.draw(st.sampled_from(self.pending[0].chunks))
        self.bench.scheduler.finish(chunk.sequence, "abort")

    @invariant()
    def text_is_the_models(self) -> None:
        for sequence in self.sequences:
            made = generated(sequence)
            assert made == continuation(sequence.request.prompt_ids, len(made))

    def teardown(self) -> None:
        if self.pending is not None:
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
