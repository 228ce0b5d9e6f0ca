"""Pages of a cache that lies in host memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Of <sys/mman.h>, since Linux 5.14: makes pages as a write would, and writes nothing.
MADV_POPULATE_WRITE = 23
# What the system takes at once where it can, a huge page.
PIECE = 2 << 20


class HostPages:
    """`parts` are uint8 `[pages, bytes]`, one for each layer's keys, values and scales; a page is
    the same row of each. Addresses never change."""

    def __init__(self, parts: Sequence[Bytes]) -> None:
        self._parts = list(parts)
        self._spans, self.page_bytes = spans_of([part.shape[1] for part in self._parts])

    def copy(self, source: int, target: int) -> None:
        for part in self._parts:
            part[target] = part[source]

    def read(self, page: int, block: Bytes) -> None:
        for part, span in zip(self._parts, self._spans, strict=True):
            block[span] = part[page]

    def write(self, block: Bytes, page: int) -> None:
        for part, span in zip(self._parts, self._spans, strict=True):
            part[page] = block[span]

    def discard(self, pages: Sequence[int]) -> None:
        for first, last in _runs(sorted(pages)):
            for part in self._parts:
                give_back(part[first:last])

    def populate(self, first: int, last: int) -> Iterator[None]:
        step = max(1, PIECE // max((part.shape[1] for part in self._parts), default=1))
        for low in range(first, last, step):
            for part in self._parts:
                if not take(part[low : min(low + step, last)]):
                    return
                yield


def spans_of(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Where parts of so many bytes lie in a page's block, and the bytes of all."""
    ends = list(accumulate(sizes))
    return [slice(e - s, e) for s, e in zip(sizes, ends, strict=True)], sum(sizes)


def give_back(memory: Bytes) -> None:
    """Return the whole system pages within `memory` (contiguous); addresses stay."""
    size = mmap.PAGESIZE
    start = memory.ctypes.data
    first, last = -(-start // size) * size, (start + memory.nbytes) // size * size
    if last > first:
        _madvise(first, last - first, mmap.MADV_DONTNEED)


def take(memory: Bytes) -> bool:
    """Make the system pages that `memory` (contiguous) lies in, as if it had been written; False on
    a system that cannot."""
    size = mmap.PAGESIZE
    start = memory.ctypes.data
    first, last = start // size * size, -(-(start + memory.nbytes) // size) * size
    try:
        _madvise(first, last - first, MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _madvise(address: int, length: int, advice: int) -> None:
    if _libc().madvise(address, length, advice):
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
