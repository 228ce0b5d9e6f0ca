"""Pages as bytes: copies, the cold file, and memory that really goes back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from engine.execution.cache import Cache, ColdFile, Store
from engine.execution.memory import private_memory
from engine.scheduling.plan import Move
from kernels.host_pages import HostPages


def parts(pages: int, *sizes: int) -> list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (pages, size), np.uint8) for size in sizes]


def test_moves_are_made_in_order(tmp_path: Path) -> None:
    held = parts(4, 64, 8)
    before = [part.copy() for part in held]
    cache = Cache(Store(HostPages(held)), ColdFile(tmp_path, 2, 72))
    assert cache.page_bytes == 72
    cache.move([(Move.DEMOTE, 0, 1), (Move.COPY, 3, 0), (Move.RESTORE, 1, 2)])
    for part, old in zip(held, before, strict=True):
        assert (part[0] == old[3]).all()
        assert (part[2] == old[0]).all()
        assert (part[1] == old[1]).all()
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_a_page_follows_it_into_its_cold_slot(tmp_path: Path) -> None:
    held, beside = parts(4, 64), parts(3, 24, 8)
    whole, windows = [part.copy() for part in held], [part.copy() for part in beside]
    cold = ColdFile(tmp_path, 2, 96)
    cache = Cache(Store(HostPages(held)), cold, windows=Store(HostPages(beside)))
    assert cache.page_bytes == 96
    cache.move([(Move.DEMOTE_WINDOW, 2, 1), (Move.DEMOTE, 0, 1), (Move.COPY_WINDOW, 1, 2)])
    assert (beside[0][2] == windows[0][1]).all()
    cache.move([(Move.RESTORE, 1, 3), (Move.RESTORE_WINDOW, 1, 0)])
    assert (held[0][3] == whole[0][0]).all()
    for part, old in zip(beside, windows, strict=True):
        assert (part[0] == old[2]).all()


def test_what_is_discarded_goes_back_to_the_system() -> None:
    pages, size = 64, mmap.PAGESIZE * 64
    held = [np.zeros((pages, size), np.uint8) for _ in range(2)]
    address = held[0].ctypes.data
    cache = Cache(Store(HostPages(held)))
    for part in held:
        part[:] = 7
    full = private_memory()
    cache.move([(Move.DISCARD, page, page) for page in range(8, 64)])
    assert full - private_memory() > 0.9 * 2 * 56 * size
    assert (held[0][:8] == 7).all()
    assert held[0].ctypes.data == address
    assert (held[0][10:20] == 0).all()


def test_a_full_disk_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"space|large|argument"):
        ColdFile(tmp_path, 2**20, 2**40)
