"""Upkeep: the pool follows the readings, and readings that fail break nothing."""

from __future__ import annotations

import logging

import pytest

from engine.scheduling.controller import CacheController, Readings
from engine.types import MonotonicClock
from engine.upkeep import Upkeep
from tests.mock import mock_scheduler


def test_the_pool_is_resized_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = mock_scheduler(64, 4, MonotonicClock())
    readings: list[Readings | None] = [None, Readings(100_000), Readings(1_000)]
    controller = CacheController(scheduler.pool, 100, low=4_000, floor=8)
    upkeep = Upkeep(scheduler, controller, lambda: readings.pop(0))
    assert not upkeep()
    assert not upkeep()
    with caplog.at_level(logging.INFO):
        assert upkeep()
    assert "KV cache shrinks to 8 of 64 pages" in caplog.text
    plan = scheduler.plan()
    assert (len(plan.moves), plan.decodes, plan.chunks) == (56, [], [])


def test_readings_that_fail_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = mock_scheduler(64, 4, MonotonicClock())
    controller = CacheController(scheduler.pool, 100, low=4_000, floor=8)

    def fail() -> Readings:
        raise OSError("no such file")

    upkeep = Upkeep(scheduler, controller, fail)
    assert not upkeep()
    assert not upkeep()
    assert caplog.text.count("no such file") == 1
