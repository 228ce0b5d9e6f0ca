"""What sequences take over from each other instead of computing it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.engine.scheduling.bench import SIZE, Bench, counts, generated
from tests.mock import continuation


@pytest.mark.parametrize("length", [9, 10, 11, 12, 13])
def test_a_repeated_prompt_costs_only_its_last_token(length: int) -> None:
    bench = Bench()
    prompt = list(range(length))
    (first,) = bench.add(prompt)
    bench.drain()
    (second,) = bench.add(prompt)
    plan = bench.step()
    assert (second.cached, plan.chunks[0].count) == (length - 1, 1)
    bench.drain()
    assert generated(second) == generated(first)


@pytest.mark.parametrize(("alike", "copied"), [(19, 0), (20, 4), (23, 4), (24, 8), (31, 12)])
def test_a_prompt_that_parts_from_another_within_a_page_copies_what_they_share(
    alike: int, copied: int
) -> None:
    bench = Bench(size=16, budget=64)
    bench.add(list(range(40)))
    bench.drain()
    prompt = [*range(alike), *range(100, 120)]
    (sequence,) = bench.add(prompt)
    bench.step()
    assert sequence.cached == 16 + copied
    bench.drain()
    assert generated(sequence) == continuation(prompt, 4)


def test_the_last_token_is_computed_though_a_page_begins_with_it() -> None:
    bench = Bench(size=16, budget=64)
    bench.add(list(range(40)))
    bench.drain()
    (sequence,) = bench.add(list(range(8)))
    bench.step()
    assert sequence.cached == 4


def test_the_page_that_a_prompt_ends_in_can_be_begun_with_too() -> None:
    bench = Bench(size=16, budget=64)
    bench.add(list(range(10)))
    bench.drain()
    prompt = [*range(9), 99, 98]
    (sequence,) = bench.add(prompt)
    bench.step()
    assert sequence.cached == 8
    bench.drain()
    assert generated(sequence) == continuation(prompt, 4)


def test_a_beginning_goes_with_its_page() -> None:
    bench = Bench(pages=4, size=16, budget=64)
    bench.add(list(range(20)))
    bench.drain()
    bench.add(list(range(200, 263)), max_tokens=1)  # takes every page
    bench.drain()
    (sequence,) = bench.add([*range(12), 99, 98])
    bench.step()
    assert sequence.cached == 0


def test_output_pages_are_reused_by_the_next_turn_of_a_conversation() -> None:
    bench = Bench()
    (first,) = bench.add(list(range(8)), max_tokens=9)
    bench.drain()
    (second,) = bench.add([*first.tokens, 5])
    bench.step()
    assert second.cached == 16


@pytest.mark.parametrize("how", ["aborted", "paused"])
def test_what_an_answer_has_filled_is_found_once_it_is_broken_off(how: str) -> None:
    bench = Bench()
    (first,) = bench.add(list(range(8)), max_tokens=30)
    for _ in range(10):
        bench.step()
    assert first.published == 2  # the prompt's
    if how == "aborted":
        bench.scheduler.finish(first, "abort")
    else:
        bench.scheduler.pause(first)
    (second,) = bench.add([*first.tokens, 5])
    bench.step()
    assert second.cached == 16


def test_an_answers_pages_are_named_together_each_sequence_in_a_step_of_its_own() -> None:
    bench = Bench(pages=64)
    for prompt in ([1] * 8, [2] * 8):
        bench.add(prompt, max_tokens=80)
    named: list[list[int]] = []
    while len(named) < 64:
        bench.step()
        named.append([s.published for s in bench.scheduler.running])
    jumps = [[b - a for a, b in zip(x, y, strict=True)] for x, y in pairwise(named[1:])]
    assert {max(jump) for jump in jumps} == {0, 5, 6, 8}
    assert not any(all(jump) for jump in jumps)


def test_what_a_stop_string_cuts_off_is_in_no_pages_name() -> None:
    bench = Bench()
    (first,) = bench.add(list(range(8)), max_tokens=30)
    for _ in range(10):
        bench.step()
    assert first.computed == 17
    del first.tokens[14:]
    bench.scheduler.finish(first, "stop")
    assert len(first.hashes) == 3


def test_what_a_failed_request_computed_is_not_named() -> None:
    bench = Bench()
    (first,) = bench.add(list(range(8)), max_tokens=30)
    for _ in range(10):
        bench.step()
    bench.scheduler.finish(first, "error")
    assert len(first.hashes) == 2


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


@pytest.mark.parametrize("length", [16, 18])
def test_the_prompt_of_eight_choices_exists_once(length: int) -> None:
    bench = Bench(pages=64, budget=64, running=8)
    choices = bench.add(list(range(length)), n=8)
    assert counts(bench.step()) == [length]  # the others wait for the pages of the first
    assert counts(bench.step()) == [1] * 8
    shared = length // SIZE
    assert {tuple(c.pages[:shared]) for c in choices} == {tuple(choices[0].pages[:shared])}
    bench.step()
    assert bench.scheduler.pool.used == shared + 8
    bench.drain()
    assert {tuple(generated(c)) for c in choices} == {tuple(continuation(range(length), 4))}


def test_requests_that_arrive_together_compute_a_common_beginning_once() -> None:
    bench = Bench(pages=64, budget=64, running=8)
    common = list(range(20))
    sequences = [bench.add([*common, 100 + i])[0] for i in range(4)]
    computed = 0
    while bench.scheduler.has_work:
        computed += bench.step().work.prefill
    assert computed <= 20 + 4 * SIZE
    for number, sequence in enumerate(sequences):
        assert generated(sequence) == continuation([*common, 100 + number], 4)


def test_choices_go_on_when_the_first_is_aborted() -> None:
    bench = Bench()
    first, second = bench.add(list(range(8)), n=2)
    plan = bench.scheduler.plan()
    result = bench.execute(plan)
    bench.scheduler.finish(first, "abort")
    bench.scheduler.commit(plan, result)
    bench.drain()
    assert generated(second) == continuation(list(range(8)), 4)
