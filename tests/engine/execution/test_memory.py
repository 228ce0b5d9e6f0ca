"""How large the KV cache becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import CacheSection, SchedulerSection
from engine.errors import ConfigError
from engine.execution import memory
from engine.execution.memory import CacheSize, Footprint, available_memory, cache_size
from kernels.backend import CacheLayout
from kernels.ops import Heads

LAYOUT = CacheLayout(heads=(Heads(4, 2, 8),) * 2, page_size=16, dtype="bfloat16")
PAGE = Footprint(page=LAYOUT.bytes_per_page)


def batch(running: int) -> SchedulerSection:
    return SchedulerSection(max_running=running)


def test_a_page_holds_keys_and_values_of_every_layer() -> None:
    assert LAYOUT.bytes_per_page == 2 * 2 * 16 * 2 * 8 * 2


def test_configured_tokens_are_rounded_up_to_pages() -> None:
    assert cache_size(CacheSection(tokens=33), PAGE, 1000, batch(4)).pages == 3


def test_otherwise_a_fraction_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: LAYOUT.bytes_per_page * 40)
    section = CacheSection(memory_fraction=0.5)
    assert cache_size(section, PAGE, 10_000, batch(64)).pages == 20
    assert (
        cache_size(section, PAGE, 17, batch(3)).pages == 6
    )  # three slots of two pages are all there is use for
    with pytest.raises(ConfigError, match="one page needs"):
        cache_size(CacheSection(memory_fraction=0.01), PAGE, 10_000, batch(64))


def test_free_memory_respects_a_cgroup_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = available_memory()
    assert whole is not None
    assert whole > 1 << 20
    limit, usage, statistics = (tmp_path / f"memory.{name}" for name in ("max", "current", "stat"))
    monkeypatch.setattr(memory, "MEMORY_FILES", ((str(limit), str(usage), str(statistics)),))
    limit.write_text("1048576\n")
    assert available_memory() == 1048576
    usage.write_text("48576\n")
    assert available_memory() == 1000000
    statistics.write_text("anon 20000\ninactive_file 30000\n")  # the latter can be dropped
    assert available_memory() == 1030000
    usage.write_text("2000000\n")
    assert available_memory() == 0
    limit.write_text("max\n")
    assert available_memory() > 1048576  # type: ignore[operator]


def test_systems_that_do_not_say_get_a_modest_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMORY_TABLE", "/nowhere/meminfo")
    assert available_memory() is None
    pages = cache_size(CacheSection(memory_fraction=0.5), PAGE, 1 << 30, batch(64)).pages
    assert pages == (2 << 30) // LAYOUT.bytes_per_page


def test_states_come_out_of_the_same_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most half of what is left beside those of who runs."""
    monkeypatch.setattr(memory, "available_memory", lambda: 200_000)
    section, page, state = CacheSection(memory_fraction=0.5), 100, 1000

    def size(section: CacheSection, device: int | None = None) -> tuple[int, int]:
        footprint = Footprint(page=page, state=state)
        found = cache_size(section, footprint, 10_000, batch(16), device)
        return found.pages, found.snapshots

    assert size(section) == ((100_000 - 16_000 - 16_000) // page, 16)
    assert size(section, 60_000) == ((30_000 - 16_000 - 7_000) // page, 7)
    few = CacheSection(memory_fraction=0.5, snapshots=3)
    assert size(few) == ((100_000 - 16_000 - 3_000) // page, 3)
    assert size(CacheSection(tokens=32)) == (2, 16)
    assert size(CacheSection(memory_fraction=0.5, prefix_caching=False))[1] == 0
    for short in (section, CacheSection(tokens=32, memory_fraction=0.5)):
        with pytest.raises(ConfigError, match=r"16 states of 1000 bytes \(scheduler.max_running"):
            size(short, 20_000)
    with pytest.raises(ConfigError, match=r"and 90 more \(cache.snapshots\)"):
        size(CacheSection(memory_fraction=0.5, snapshots=90))


WINDOWED = Footprint(page=1000, window_page=800, window=100)
FEW = SchedulerSection(max_running=2, max_batch_tokens=64)


def sized(section: CacheSection, monkeypatch: pytest.MonkeyPatch, free: int) -> CacheSize:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    return cache_size(section, WINDOWED, 10_000, FEW)


def test_layers_with_windows_keep_no_more_than_those_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = CacheSection(memory_fraction=0.5)
    # Two windows of 8 pages and two steps of 4, and as much again for others to begin from.
    ample = 2 * (2 * 8 + 8)
    size = sized(section, monkeypatch, 400_000)
    assert size == CacheSize((200_000 - ample * 800) // 200, 0, ample)
    assert size.bytes(WINDOWED) == 809 * 200 + 49 * 800
    # Half of the memory is theirs at most.
    assert sized(section, monkeypatch, 100_000) == CacheSize(126, 0, 31)
    assert sized(section, monkeypatch, 40_000) == CacheSize(32, 0, 17), "one gets on with 17"
    assert sized(section, monkeypatch, 32_000) == CacheSize(16), "with them, fewer would be left"
    # Where that leaves room for a whole context, it is less.
    assert sized(section, monkeypatch, 300_000) == CacheSize(625, 0, 31)
    assert sized(section, monkeypatch, 4_000_000) == CacheSize(1250), "there is room for all"
    whole = CacheSection(memory_fraction=0.5, windows="whole")
    assert sized(whole, monkeypatch, 400_000) == CacheSize(200)


def test_where_windows_would_leave_room_for_less_all_layers_share_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of short contexts everything lies within the window; and what is too little is too little."""
    monkeypatch.setattr(memory, "available_memory", lambda: 400_000)
    half = CacheSection(memory_fraction=0.5)
    assert cache_size(half, WINDOWED, 112, SchedulerSection(max_running=64)) == CacheSize(200)
    every = Footprint(page=800, window_page=800, window=100)
    monkeypatch.setattr(memory, "available_memory", lambda: 20_000)
    assert cache_size(half, every, 10_000, FEW) == CacheSize(12)


def test_configured_tokens_are_those_that_all_layers_but_windowed_ones_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sized(CacheSection(tokens=16_000), monkeypatch, 1) == CacheSize(1000, 0, 48)
    assert sized(CacheSection(tokens=640), monkeypatch, 1) == CacheSize(40, 0, 24)
    assert sized(CacheSection(tokens=320), monkeypatch, 1) == CacheSize(20)
    assert sized(CacheSection(tokens=16_000, windows="whole"), monkeypatch, 1) == CacheSize(1000)


def test_where_all_layers_have_windows_pages_themselves_take_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    every = Footprint(page=800, window_page=800, window=100)
    size = cache_size(CacheSection(memory_fraction=0.5), every, 10_000, FEW)
    assert size == CacheSize(16 * 48, 0, 48)
    assert size.bytes(every) == 49 * 800
