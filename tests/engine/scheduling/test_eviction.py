"""Eviction: what each policy gives up first, and which one is followed."""

from __future__ import annotations

import pytest

from engine.scheduling.cold import ColdIndex
from engine.scheduling.eviction import PERIOD, Adaptive, Order, Record, Shadow


def order(policy: str, records: dict[str, Record]) -> list[object]:
    queue = Order(policy)
    for name, record in records.items():
        queue.add(name, record)
    return [queue.pop() for _ in records]


@pytest.mark.parametrize(
    ("policy", "first"),
    [("lru", "old"), ("lfu", "rare"), ("cost", "deep"), ("sieve", "rare")],
)
def test_what_goes_first(policy: str, first: str) -> None:
    records = {
        "old": Record(hits=4, used=1, born=1, visited=True),
        "rare": Record(hits=0, used=2, born=2),
        "deep": Record(hits=1, used=3, born=3, depth=15),
        "new": Record(hits=9, used=4, born=4, visited=True),
    }
    assert order(policy, records)[0] == first


def test_sieve_spares_who_was_used_once() -> None:
    shadow = Shadow("sieve", 2)
    for name in (b"a", b"b", b"a", b"c"):
        shadow.access(name, 0)
    assert (shadow.access(b"a", 0), shadow.access(b"b", 0)) == (True, False)


def test_an_item_that_was_taken_out_is_not_popped() -> None:
    queue = Order("lru")
    for n in range(300):
        queue.add(n, Record(used=n))
    for n in range(299):
        queue.remove(n)
    assert len(queue) == 1
    assert queue.pop() == 299


def test_another_policy_reorders_what_is_there() -> None:
    queue = Order("lru")
    queue.add("old", Record(hits=5, used=1))
    queue.add("rare", Record(hits=0, used=2))
    queue.follow("lfu")
    assert queue.pop() == "rare"


def test_adaptive_follows_what_hits_most() -> None:
    """A favourite between long scans: LRU forgets it every time, and others do not."""
    adaptive = Adaptive(10)
    for n in range(4 * PERIOD):
        adaptive.access((n if n % 13 > 1 else 0).to_bytes(4, "little"), 0)
    assert adaptive.choice != "lru"


def test_the_cold_tier_drops_the_longest_unused_and_names_a_content_once() -> None:
    cold = ColdIndex(2, 1.0)
    assert cold.put((b"a",), 0) is not None
    assert cold.put((b"b", b"b2"), 0) is not None
    assert cold.put((b"a",), 0) is None  # it is there, and used now
    slot = cold.put((b"c",), 0)
    assert slot is not None
    assert cold.take(b"b") is None
    assert cold.take(b"b2") is None
    assert cold.take(b"a") is not None
    assert len(cold) == 2
    cold.clear()
    assert (len(cold), cold.take(b"a")) == (0, None)


def test_what_takes_longer_to_read_than_to_compute_is_computed() -> None:
    cold = ColdIndex(2, recompute_seconds=0.002)
    cold.put((b"a",), 0)
    assert cold.worth_restoring(b"a")
    for _ in range(20):
        cold.observe(0.1, 2)
    assert not cold.worth_restoring(b"a")
    assert not ColdIndex().worth_restoring(b"a")
