"""Memory for pages is there before they are written, and no more of it than was asked for."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np
import numpy.typing as npt
import pytest

from engine import AsyncEngine
from engine.execution.ahead import GROUP, Ahead
from engine.execution.cache import Cache, Store
from engine.scheduling.plan import Move
from kernels import host_pages
from kernels.host_pages import HostPages
from tests.tiny import write_llama

MB = 2**20
RELEASE = tuple(int(number) for number in platform.release().split("-")[0].split(".")[:2])
# By the version, since a call that is wrong is refused like one that is not known.
needs_populate = pytest.mark.skipif(RELEASE < (5, 14), reason="a system before Linux 5.14")


class Taken(HostPages):
    """Pages of one byte; notes which have been taken."""

    def __init__(self) -> None:
        super().__init__([np.zeros((4 * GROUP, 1), np.uint8)])
        self.pages: list[int] = []

    def populate(self, first: int, last: int) -> Iterator[None]:
        for page in range(first, last):
            self.pages.append(page)
            yield


def rest(ahead: Ahead | Cache) -> None:
    for _ in range(10_000):
        if not ahead.rest():
            return
    raise AssertionError("it never ends")


def test_so_many_pages_beyond_the_highest_in_use_are_taken_once() -> None:
    pages = Taken()
    ahead = Ahead(pages, total=GROUP + 100, count=50)
    rest(ahead)
    assert pages.pages == list(range(50))
    ahead.use(20)
    ahead.use(10)
    rest(ahead)
    assert pages.pages == list(range(70))
    ahead.use(90)  # what was not taken in time is not needed any more
    rest(ahead)
    assert pages.pages == [*range(70), *range(90, 140)]
    ahead.use(GROUP + 90)
    rest(ahead)
    assert pages.pages[-10:] == list(range(GROUP + 90, GROUP + 100)), "no more than there are"


def test_each_call_takes_a_piece() -> None:
    pages = Taken()
    ahead = Ahead(pages, total=100, count=3)
    asked = 0
    while ahead.rest():
        asked += 1
        assert len(pages.pages) <= asked
    assert pages.pages == [0, 1, 2]


def test_none_is_taken_while_the_system_has_little_left() -> None:
    pages, left = Taken(), [True, False, True]
    ahead = Ahead(pages, total=3 * GROUP, count=3 * GROUP, enough=lambda: left.pop())
    rest(ahead)
    assert pages.pages == list(range(GROUP)), "it asks before each group"
    assert left == [True]
    rest(Ahead(pages, total=9, count=0))
    assert len(pages.pages) == GROUP


def test_memory_that_was_given_back_is_not_taken_again() -> None:
    pages = Taken()
    cache = Cache(Store(pages), ahead=[Ahead(pages, total=100, count=100)])
    assert cache.rest()
    assert cache.rest()
    before = len(pages.pages)
    cache.move([(Move.DISCARD, 99, 99)])
    cache.use(1)
    rest(cache)
    assert len(pages.pages) == before < 100


def untouched(count: int, size: int) -> host_pages.Bytes:
    """Memory of its own that nobody has written: what an allocator gives may have been used."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, count * size, flags), np.uint8).reshape(count, size)


def is_resident(memory: host_pages.Bytes) -> npt.NDArray[np.bool_]:
    """Whether each of the system's pages lies in memory."""
    found = np.zeros(memory.nbytes // mmap.PAGESIZE, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    assert libc.mincore(address, size, ctypes.c_void_p(found.ctypes.data)) == 0
    return found.astype(bool)


def test_window_pages_are_taken_as_well() -> None:
    pages, windows = Taken(), Taken()
    cache = Cache(
        Store(pages),
        windows=Store(windows),
        ahead=[Ahead(pages, total=9, count=4), Ahead(windows, total=9, count=2)],
    )
    cache.use(3, 1)
    rest(cache)
    assert pages.pages == [3, 4, 5, 6]
    assert windows.pages == [1, 2]


@needs_populate
def test_what_is_taken_takes_memory_and_keeps_what_it_holds() -> None:
    count, size = 256, 16 * mmap.PAGESIZE
    held = [untouched(count, size) for _ in range(2)]
    held[1][5] = 7
    pieces = HostPages(held).populate(0, count // 4)
    assert 0 < sum(1 for _ in pieces) <= count
    for memory in held:
        assert is_resident(memory[: count // 4]).all()
        # Whole huge pages are taken, so up to 2 MB of the next quarter.
        assert not is_resident(memory[count // 2 :]).any()
    assert (held[1][5] == 7).all()
    assert not held[0].any()


def test_pages_of_no_layer_take_nothing() -> None:
    # Where all layers have a window, all lies in window pages.
    assert list(HostPages([]).populate(0, 5)) == []


@needs_populate
@pytest.mark.parametrize("wanted", [0, 16])
async def test_an_idle_engine_takes_what_its_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    taken: list[int] = []

    def take(memory: host_pages.Bytes) -> bool:
        taken.append(memory.nbytes)
        return real(memory)

    real = host_pages.take
    monkeypatch.setattr(host_pages, "take", take)
    model = write_llama(tmp_path / "tiny", num_hidden_layers=4, num_key_value_heads=4, head_dim=64)
    settings = {"cache__tokens": 65_536, "cache__ahead_mb": wanted, "cache__dtype": "float32"}
    async with AsyncEngine.from_pretrained(str(model), **settings) as engine:
        assert engine.parts.budget is not None
        page = engine.parts.budget.cache / engine.parts.scheduler.pool.total
        with anyio.move_on_after(10):
            while sum(taken) < wanted * MB:
                await anyio.sleep(0.05)
        await anyio.sleep(0.2)
        assert wanted * MB <= sum(taken) < wanted * MB + page
