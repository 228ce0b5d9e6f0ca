"""The size of the pool follows the memory that is left."""

from __future__ import annotations

import pytest

from engine.scheduling.controller import CacheController, Readings
from engine.scheduling.pages import GROUP, PagePool

BYTES = 1000


def make(pages: int = 100) -> tuple[PagePool, CacheController]:
    pool = PagePool(pages, 4)
    return pool, CacheController(pool, BYTES, low=20 * BYTES, floor=16)


@pytest.mark.parametrize(
    ("available", "stalled", "target"),
    [(100, 0.0, 100), (30, 0.0, 100), (10, 0.0, 50), (0, 0.0, 40), (100, 0.5, 75)],
)
def test_little_memory_or_stalls_make_it_smaller_than_what_it_holds(
    available: int, stalled: float, target: int
) -> None:
    pool, controller = make()
    assert pool.allocate(80) is not None
    assert controller.target(Readings(available * BYTES, stalled)) == target


def test_it_never_becomes_too_small_for_a_whole_sequence() -> None:
    _, controller = make(20)
    assert controller.target(Readings(0)) == 16


def test_it_grows_again_only_if_that_helps() -> None:
    pool, controller = make()
    pool.park(64)
    plenty = Readings(80 * BYTES)
    assert controller.target(plenty) == pool.available
    pages = pool.allocate(pool.free)
    assert pages is not None
    pool.publish(pages[0], b"a")
    pool.release(pages)
    assert pool.allocate(pool.free) is not None  # evicts the content ...
    assert pool.acquire(b"a") is None  # ... that somebody wants
    assert controller.target(plenty) == pool.available + 20


def test_parked_pages_are_neighbours_and_only_free_ones() -> None:
    pool = PagePool(4 * GROUP, 4)
    held = pool.allocate(GROUP + 1)
    assert held is not None
    assert pool.park(100) == [*range(3 * GROUP, 4 * GROUP), *range(2 * GROUP, 3 * GROUP)]
    assert (pool.available, pool.free) == (2 * GROUP, GROUP - 1)
    pool.audit([held])
    assert pool.park(GROUP) == []
    assert len(pool.unpark(GROUP)) == GROUP
    pool.audit([held])
    pool.release(held)
