"""Leases: what is kept for whoever goes on, and how long."""

from __future__ import annotations

from engine.scheduling.sequence import Sequence
from tests.engine.scheduling.bench import SIZE, Bench, generated

PROMPT = list(range(1, 13))
OTHER = list(range(20, 32))


def crowd(bench: Bench, runs: int = 6) -> None:
    """Other prompts, one after the other, more than the pool holds."""
    for number in range(runs):
        bench.add([40 + number, *OTHER], max_tokens=4)
        bench.drain()


def found(bench: Bench, sequence: Sequence) -> int:
    """How many prompt tokens the next request of the conversation finds."""
    (later,) = bench.add([*sequence.tokens, 50], max_tokens=1)
    bench.drain()
    return later.cached


def conversation(bench: Bench, **options: str) -> Sequence:
    (sequence,) = bench.add(PROMPT, max_tokens=5, **options)
    bench.drain()
    return sequence


def test_what_has_ended_is_forgotten_last_under_a_lease() -> None:
    bench = Bench(pages=12)
    unleased = conversation(bench)
    crowd(bench)
    assert found(bench, unleased) == 0, "the crowd is not large enough"

    bench = Bench(pages=12)
    leased = conversation(bench, lease="a")
    assert bench.scheduler.pool.kept == 4
    crowd(bench)
    assert found(bench, leased) == 16


def test_a_lease_ends_when_its_time_has_passed() -> None:
    bench = Bench(pages=12, lease=10.0)
    leased = conversation(bench, lease="a")
    bench.clock.time += 10.0
    crowd(bench)
    assert len(bench.scheduler.leases) == 0
    assert found(bench, leased) == 0


def test_a_lease_that_is_given_up_keeps_nothing() -> None:
    bench = Bench(pages=12)
    leased = conversation(bench, lease="a")
    bench.scheduler.leases.drop("a")
    bench.scheduler.leases.drop("of nobody")
    assert bench.scheduler.pool.kept == 0
    crowd(bench)
    assert found(bench, leased) == 0


def test_the_next_turn_takes_the_lease_over() -> None:
    bench = Bench(pages=12)
    first = conversation(bench, lease="a")
    (second,) = bench.add([*first.tokens, 50, 51, 52], max_tokens=4, lease="a")
    bench.step()
    assert len(bench.scheduler.leases) == 0, "it holds the pages itself"
    bench.drain()
    assert second.cached == 16
    assert len(bench.scheduler.leases) == 1
    assert bench.scheduler.pool.kept == 5


def test_nobody_waits_for_pages_that_are_kept() -> None:
    bench = Bench(pages=8)
    conversation(bench, lease="a")
    assert bench.scheduler.pool.kept == 4
    (large,) = bench.add(list(range(40, 64)), max_tokens=6)
    bench.drain()
    assert len(generated(large)) == 6
    assert large.preemptions == 0


def test_leases_hold_half_of_the_pool_at_most() -> None:
    bench = Bench(pages=16)
    for name in "abc":
        (sequence,) = bench.add([ord(name), *PROMPT[1:]], max_tokens=5, lease=name)
        bench.drain()
    assert bench.scheduler.pool.kept == 8
    bench.scheduler.leases.drop("a")
    assert bench.scheduler.pool.kept == 8, "the oldest had made room"
    assert sequence.request.lease == "c"


def test_what_is_set_aside_finds_its_pages_again() -> None:
    bench = Bench(pages=12)
    (sequence,) = bench.add(PROMPT, max_tokens=12)
    while sequence.generated < 5:
        bench.step()
    before = list(sequence.tokens)
    bench.scheduler.pause(sequence)
    crowd(bench)
    bench.scheduler.unpause(sequence)
    plan = bench.step()
    assert plan.chunks[0].start == len(before) - 1 - (len(before) - 1) % SIZE
    assert len(bench.scheduler.leases) == 0
    bench.drain()
    assert sequence.tokens[: len(before)] == before
    assert len(generated(sequence)) == 12


def test_what_ends_while_it_is_set_aside_has_no_lease() -> None:
    bench = Bench(pages=12)
    (sequence,) = bench.add(PROMPT, max_tokens=12)
    bench.step()
    bench.step()
    bench.scheduler.pause(sequence)
    assert len(bench.scheduler.leases) == 1
    bench.scheduler.finish(sequence, "abort")
    assert len(bench.scheduler.leases) == bench.scheduler.pool.kept == 0


def test_without_a_cache_or_time_nothing_is_kept() -> None:
    for options in ({"prefix_caching": False}, {"lease": 0.0}):
        bench = Bench(pages=12, **options)
        conversation(bench, lease="a")
        assert len(bench.scheduler.leases) == bench.scheduler.pool.kept == 0


def test_who_is_set_aside_again_at_once_keeps_what_it_had() -> None:
    bench = Bench(pages=12)
    (sequence,) = bench.add(PROMPT, max_tokens=12)
    while sequence.generated < 5:
        bench.step()
    bench.scheduler.pause(sequence)
    kept = bench.scheduler.pool.kept
    bench.scheduler.unpause(sequence)
    plan = bench.scheduler.plan()
    result = bench.execute(plan)
    bench.scheduler.pause(sequence)
    bench.scheduler.commit(plan, result)
    assert bench.scheduler.pool.kept == kept > 0


def test_a_pool_that_shrinks_keeps_less() -> None:
    bench = Bench(pages=16)
    for name in "ab":
        bench.add([ord(name), *PROMPT[1:]], max_tokens=5, lease=name)
        bench.drain()
    assert bench.scheduler.pool.kept == 8
    bench.scheduler.resize(8)
    bench.scheduler.plan()
    assert bench.scheduler.pool.available == 8
    assert len(bench.scheduler.leases) == 1
