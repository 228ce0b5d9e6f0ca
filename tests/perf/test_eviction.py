"""The eviction benchmark: Belady's figure is the best, and traces are read as they are."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from perf.eviction import NAMES, azure, belady, mooncake, replay, synthetic


def best(trace: list[list[bytes]], capacity: int) -> float:
    """The most blocks that any choice of evictions finds, by trying all; one block a request."""
    states: dict[frozenset[bytes], int] = {frozenset(): 0}
    for (block,) in trace:
        following: dict[frozenset[bytes], int] = {}
        for held, found in states.items():
            score = found + (block in held)
            with_it = held | {block}
            for kept in itertools.combinations(sorted(with_it), min(capacity, len(with_it))):
                key = frozenset(kept)
                following[key] = max(following.get(key, 0), score)
        states = following
    return max(states.values()) / len(trace)


def test_belady_finds_as_much_as_anybody_could() -> None:
    chance = random.Random(0)
    for _ in range(20):
        trace = [[bytes([chance.randrange(5)])] for _ in range(14)]
        assert belady(trace, 2) == pytest.approx(best(trace, 2))


@pytest.mark.parametrize("policy", NAMES)
def test_no_policy_beats_it_and_all_find_something(policy: str) -> None:
    trace = synthetic(300, seed=1)
    assert 0.1 < replay(trace, 200, policy) <= belady(trace, 200) + 1e-9


def test_a_pool_that_holds_everything_finds_what_belady_does() -> None:
    trace = synthetic(100, seed=2)
    for policy in NAMES:
        assert replay(trace, 10_000, policy) == pytest.approx(belady(trace, 10_000))


def test_traces_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"hash_ids": ids}) for ids in ([0, 1], [0, 2], [3])]
    file = tmp_path / "mooncake.jsonl"
    file.write_text("\n".join(lines))
    first, second, third = mooncake(file, 10)
    assert first[0] == second[0] != third[0]
    file = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:00:{n:02d},{300 + 200 * n},50" for n in range(20)]
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    trace = azure(file, 20, seed=0)
    assert [len(blocks) for blocks in trace] == [(300 + 200 * n) // 128 for n in range(20)]
    assert belady(trace, 1000) > 0.2
