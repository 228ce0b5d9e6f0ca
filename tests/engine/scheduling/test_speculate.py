"""Guesses from the text itself: never another answer, fewer steps where it repeats itself."""

from __future__ import annotations

from typing import Any

import pytest

from engine.scheduling.budget import Pace
from engine.scheduling.cost import FLAT, Profile
from engine.scheduling.speculate import REST, STRIDE, Track
from engine.types import Grammar
from tests.engine.scheduling.bench import Bench, generated
from tests.mock import continuation, mock_engine, next_token

PROMPT = [1, 2, 3, 4, 5, 6, 1, 2, 3]
# Each row costs what a step costs.
STEEP = Profile((1, 512), (0.001, 0.512), 0.0, 0.0, 0.0)


def circle(context: list[int]) -> int:
    """The prompt's first six tokens over and over."""
    return (context[-1] % 6) + 1


def bench(most: int, choose: Any = circle, profile: Profile = FLAT, **options: Any) -> Bench:
    return Bench(
        pages=64, budget=40, choose=choose, profile=profile, speculative_tokens=most, **options
    )


def steps_of(bench: Bench) -> int:
    bench.drain()
    return len(bench.executor.plans)


def test_what_repeats_itself_takes_fewer_steps() -> None:
    plain, guessing = bench(0), bench(4)
    (one,) = plain.add(PROMPT, max_tokens=40)
    (other,) = guessing.add(PROMPT, max_tokens=40)
    assert steps_of(plain) == 40
    assert steps_of(guessing) < 15
    assert generated(other) == generated(one)
    assert guessing.scheduler.speculator.accepted == guessing.scheduler.speculator.drafted > 20


@pytest.mark.parametrize("most", [1, 3, 8])
def test_what_is_guessed_wrong_changes_nothing(most: int) -> None:
    guessing = bench(most, next_token)
    guessing.scheduler.speculator.gram = 1
    (sequence,) = guessing.add(PROMPT, max_tokens=60)
    guessing.drain()
    assert generated(sequence) == continuation(PROMPT, 60)
    speculator = guessing.scheduler.speculator
    assert speculator.drafted > speculator.accepted


def test_an_answer_ends_where_it_would_have_ended() -> None:
    def three_then_end(context: list[int]) -> int:
        return 256 if len(context) >= len(PROMPT) + 9 else circle(context)

    guessing = bench(8, three_then_end)
    (sequence,) = guessing.add(PROMPT, max_tokens=40)
    guessing.drain()
    assert len(generated(sequence)) == 10
    assert sequence.finish_reason == "stop"
    for count in range(1, 12):
        guessing = bench(8)
        (sequence,) = guessing.add(PROMPT, max_tokens=count)
        guessing.drain()
        assert (len(generated(sequence)), sequence.finish_reason) == (count, "length")


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 3},
        {"grammar": Grammar("regex", "a+")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_draws_that_depend_on_what_was_drawn_are_not_guessed(options: dict[str, Any]) -> None:
    guessing = bench(4)
    (sequence,) = guessing.add(PROMPT, max_tokens=20, **options)
    guessing.scheduler.plan()
    sequence.scheduled = len(sequence.tokens) - 1
    assert guessing.scheduler.speculator.guesses([sequence]) == {}


def test_nothing_is_guessed_where_rows_are_dear() -> None:
    guessing = bench(4, profile=STEEP)
    guessing.add(PROMPT, max_tokens=40)
    guessing.drain()
    assert guessing.scheduler.speculator.drafted == 0


def test_a_device_that_waits_for_its_guesses_is_not_for_nothing() -> None:
    """Time passes between a step's result and the next step, which guesses depend on."""
    for seconds, guesses in ((0.0, True), (0.0019, False)):
        guessing = bench(8)
        guessing.scheduler.speculator.waited(seconds)
        guessing.add(PROMPT, max_tokens=40)
        while not guessing.scheduler.decoding:
            guessing.step()
        guessing.step()
        assert (guessing.scheduler.speculator.drafted > 0) == guesses
    # As long as the step itself, as far as it counts: what fares well goes on.
    guessing.scheduler.speculator.waited(10.0)
    (track,) = guessing.scheduler.speculator._tracks.values()
    assert track is not None
    track.rate = 0.95
    plan = guessing.step()
    assert any(len(chunk.given) > 1 for chunk in plan.chunks)


def test_the_wait_for_a_step_in_flight_is_measured() -> None:
    guessing = bench(8)
    guessing.add(PROMPT, max_tokens=100)
    for _ in range(12):
        guessing.clock.time += 0.0005
        guessing.step()
    assert guessing.scheduler.speculator._wait == pytest.approx(0.0005)


def test_nothing_is_guessed_while_prompts_wait() -> None:
    guessing = bench(4)
    guessing.add(PROMPT, max_tokens=40)
    guessing.step()
    guessing.add(list(range(1, 60)), max_tokens=1)
    plan = guessing.step()
    assert not any(chunk.given for chunk in plan.chunks)


def test_nobody_goes_for_a_guess() -> None:
    """The pool has room for what is there, and hardly more."""
    guessing = Bench(pages=12, budget=40, choose=circle, speculative_tokens=8)
    for _ in range(2):
        guessing.add(PROMPT, max_tokens=14)
    guessing.drain()
    assert guessing.scheduler.preemptions == 0


def test_several_share_a_step() -> None:
    plain, guessing = bench(0), bench(4)
    for each in (plain, guessing):
        for _ in range(3):
            each.add(PROMPT, max_tokens=30)
    assert steps_of(guessing) < steps_of(plain) / 2


def test_a_track_that_fares_badly_rests_longer_each_time() -> None:
    track = Track(1)
    assert track.find([1, 2]) is None
    assert track.find([1, 2, 1]) == 1
    track.until = 5
    assert track.find([1, 2, 1, 2]) is None
    assert track.find([1, 2, 1, 2, 1]) == 3
    assert track.rest == REST


async def test_a_stop_string_cuts_what_was_drawn_with_it() -> None:
    from engine import SamplingParams

    def letters(context: list[int]) -> int:
        return ord("abcdef"[(context[-1] - ord("a") + 1) % 6])

    prompt = list(b"abcdefabc")
    for stop in ("f", "fa", "bcd", "e"):
        texts = []
        for most in (0, 8):
            engine, _ = mock_engine(choose=letters, speculative_tokens=most)
            async with engine:
                params = SamplingParams(max_tokens=40, stop=(stop,), logprobs=0)
                deltas = [d async for d in engine.generate(prompt, params)]
                accepted = engine.parts.scheduler.speculator.accepted
            usage = deltas[-1].usage
            assert usage is not None
            tokens = [token for d in deltas for token in d.token_ids]
            scores = [score for d in deltas for score in d.logprobs]
            assert len(tokens) == len(scores) == usage.completion_tokens
            assert [score.token_id for score in scores] == tokens
            end = (deltas[-1].finish_reason, deltas[-1].stop_reason)
            texts.append(("".join(d.text for d in deltas), tokens, end))
            assert (accepted > 0) == (most > 0)
        assert texts[0] == texts[1]


async def test_the_loop_gains_what_was_guessed() -> None:
    """Through the real loop, which plans a step ahead of the one that runs."""
    from engine import SamplingParams

    for most in (0, 6):
        engine, executor = mock_engine(choose=circle, speculative_tokens=most, pages=128)
        executor.delay = 0.002
        async with engine:
            params = SamplingParams(max_tokens=100)
            deltas = [d async for d in engine.generate(PROMPT, params)]
        tokens = [token for d in deltas for token in d.token_ids]
        assert tokens[:6] == [4, 5, 6, 1, 2, 3]
        assert len(tokens) == 100
        steps = len(executor.plans)
        assert steps == 100 if most == 0 else steps < 45


def test_a_long_text_is_looked_through_bit_by_bit() -> None:
    text = list(range(1000, 1000 + 5 * STRIDE))
    tokens = [7, 8, 9, *text, 7, 8, 9]
    track = Track(3)
    found = [track.find(tokens) for _ in range(7)]
    assert found == [None] * 5 + [3, 3]
    tokens += [1000, 7, 8, 9]
    assert track.find(tokens) == 3 + len(text) + 3, "the last one counts"


def most_rows(bench: Bench) -> int:
    return max(len(p.decodes) + sum(c.count for c in p.chunks) for p in bench.executor.plans)


def test_a_step_takes_no_more_rows_than_it_may() -> None:
    guessing = Bench(pages=128, budget=16, choose=circle, speculative_tokens=8)
    for _ in range(4):
        guessing.add(PROMPT, max_tokens=40)
    guessing.drain()
    assert guessing.scheduler.speculator.drafted > 0
    assert most_rows(guessing) <= 16


@pytest.mark.parametrize("asked", [{}, {"target_itl": 0.05}], ids=["ever", "one request"])
def test_a_step_takes_no_longer_than_it_may(asked: dict[str, float]) -> None:
    slope = Profile((1, 101), (0.03, 1.03), 0.0, 0.0, 0.0)
    limit = 0.8 * 0.05 if asked else 0.06
    guessing = bench(8, profile=slope, pace=Pace(longest=0.06))
    guessing.scheduler.speculator._tracks.clear()
    guessing.add(PROMPT, max_tokens=40, **asked)
    while guessing.scheduler.has_work:
        plan = guessing.step()
        if any(len(chunk.given) > 1 for chunk in plan.chunks):
            assert plan.predicted <= limit + 1e-9


def test_rows_that_read_much_are_not_for_nothing() -> None:
    """A guess reads all that is before it, like any row."""
    dear = Profile((1, 512), (0.001, 0.002), 0.0, 0.01, 0.0)
    guessing = bench(8, profile=dear)
    guessing.add(PROMPT, max_tokens=40)
    guessing.drain()
    assert guessing.scheduler.speculator.drafted == 0


def test_prompts_hurry_no_more_because_somebody_guessed() -> None:
    slope = Profile((1, 1001), (0.001, 1.001), 0.0, 0.0, 0.0)
    plans = []
    for most in (0, 4):
        each = Bench(
            pages=512, budget=400, choose=circle, profile=slope, pace=Pace(0.02),
            speculative_tokens=most,
        )  # fmt: skip
        each.add(PROMPT, max_tokens=200)
        for _ in range(8):
            each.step()
        each.add([7 + n % 80 for n in range(300)], max_tokens=1)
        plans.append(each.step())
    assert plans[1].predicted <= 1.2 * plans[0].predicted


def test_all_guesses_are_counted_the_last_ones_too() -> None:
    guessing = bench(8)
    stats = []
    for _ in range(5):
        guessing.add(PROMPT, max_tokens=14)
        while guessing.scheduler.has_work:
            plan = guessing.step()
            stats.append(sum(len(c.given) - 1 for c in plan.chunks if c.given))
    assert guessing.scheduler.speculator.drafted == sum(stats) > 0


async def test_what_is_cut_off_is_not_paid_for() -> None:
    from engine import SamplingParams

    def letters(context: list[int]) -> int:
        return ord("abcdef"[(context[-1] - ord("a") + 1) % 6])

    counters = []
    for most in (0, 8):
        engine, _ = mock_engine(choose=letters, speculative_tokens=most)
        async with engine:
            params = SamplingParams(max_tokens=40, stop=("ab",))
            async for _ in engine.generate(list(b"abcdefabcdefabc"), params):
                pass
            (account,) = engine.parts.scheduler.queue.accounts.values()
            counters.append(account.counter)
    assert counters[0] == counters[1]


def test_who_is_set_aside_holds_no_memory() -> None:
    guessing = bench(4)
    (sequence,) = guessing.add(PROMPT, max_tokens=40)
    while sequence.generated < 10:
        guessing.step()
    track = guessing.scheduler.speculator._tracks[sequence]
    assert track is not None
    assert track._ends
    guessing.scheduler.pause(sequence)
    assert not track._ends
    guessing.scheduler.unpause(sequence)
    guessing.drain()
    assert not guessing.scheduler.speculator._tracks
