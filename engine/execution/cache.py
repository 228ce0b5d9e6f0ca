"""Pages of the KV cache as bytes: copies, the cold tier's file, and memory that is given back."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.scheduling.plan import Move
from kernels.backend import PageCodec

Bytes = npt.NDArray[np.uint8]


class ColdFile:
    """A memory-mapped file of pages without a name: it goes with the process.

    `slots` pages of `page_bytes` each.
    """

    def __init__(self, folder: Path, slots: int, page_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        size = slots * page_bytes
        with tempfile.TemporaryFile(dir=folder, prefix="cold-") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not later
            self._map = mmap.mmap(file.fileno(), size)
        self.pages: Bytes = np.frombuffer(self._map, np.uint8).reshape(slots, page_bytes)


class Cache:
    """All that holds KV pages: `parts` are uint8 `[pages, bytes]`, one for each layer's keys,
    values and scales; a page is the same row of each. Addresses never change.

    Pages lie in the cold tier byte for byte, or as a `codec` makes them.
    """

    def __init__(
        self, parts: Sequence[Bytes], cold: ColdFile | None = None, codec: PageCodec | None = None
    ) -> None:
        self._parts = list(parts)
        self._cold = cold
        self._codec = codec
        ends = np.cumsum([part.shape[1] for part in self._parts]).tolist()
        # Where each part lies in a cold page.
        self._spans = [slice(e - p.shape[1], e) for p, e in zip(self._parts, ends, strict=True)]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all parts."""
        return sum(part.shape[1] for part in self._parts)

    def move(self, moves: Sequence[tuple[Move, int, int]]) -> None:
        """Make a step's moves, in order."""
        discarded: list[int] = []
        for kind, source, target in moves:
            if kind is not Move.DISCARD and discarded:
                self.discard(discarded)  # before anything is put where they were
                discarded = []
            if kind is Move.COPY:
                for part in self._parts:
                    part[target] = part[source]
            elif kind is Move.DISCARD:
                discarded.append(source)
            elif kind is Move.DEMOTE:
                self._demote(source, target)
            else:
                self._restore(source, target)
        if discarded:
            self.discard(discarded)

    def discard(self, pages: Sequence[int]) -> None:
        """Give the memory of pages back to the system; they read as zeros afterwards."""
        for first, last in _runs(sorted(pages)):
            for part in self._parts:
                give_back(part[first:last])

    def close(self) -> None:
        """Forget all pages."""
        self._parts, self._cold, self._codec = [], None, None

    def _demote(self, page: int, slot: int) -> None:
        assert self._cold is not None
        block = self._cold.pages[slot]
        if self._codec is not None:
            return self._codec.compress(page, block)
        for part, span in zip(self._parts, self._spans, strict=True):
            block[span] = part[page]
        return None

    def _restore(self, slot: int, page: int) -> None:
        assert self._cold is not None
        block = self._cold.pages[slot]
        if self._codec is not None:
            return self._codec.restore(block, page)
        for part, span in zip(self._parts, self._spans, strict=True):
            part[page] = block[span]
        return None


def give_back(memory: Bytes) -> None:
    """Return the whole system pages within `memory` (contiguous); addresses stay."""
    size = mmap.PAGESIZE
    start = memory.ctypes.data
    first, last = -(-start // size) * size, (start + memory.nbytes) // size * size
    if last > first:
        _madvise(first, last - first)


def _madvise(address: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(address, length, mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise failed")


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring pages together, as (first, behind the last)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
