"""Pages of the KV cache on the move: copies, the cold tier's file, memory that is given back."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.execution.ahead import Ahead
from engine.scheduling.plan import WINDOW_MOVES, Move
from kernels.backend import PageCodec, Pages, States

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


@dataclass(frozen=True)
class Store:
    """The pages of a device, or its window pages, and how they lie in the cold tier: byte for byte,
    or as a `codec` makes them."""

    pages: Pages
    codec: PageCodec | None = None

    @property
    def cold_bytes(self) -> int:
        """Bytes of one in the cold tier."""
        return (self.pages if self.codec is None else self.codec).page_bytes

    def demote(self, page: int, block: Bytes) -> None:
        """Fill `block`, uint8 `[cold_bytes]`, with a page."""
        (self.pages.read if self.codec is None else self.codec.compress)(page, block)

    def restore(self, block: Bytes, page: int) -> None:
        """Make a page of what `demote` left in `block`."""
        (self.pages.write if self.codec is None else self.codec.restore)(block, page)


class Cache:
    """All that holds KV pages: those of the device, and the cold tier behind them, where what lies
    beside a page in `windows` follows it; and `states`, where layers keep some. Memory is taken
    `ahead` for pages, and for those in `windows`."""

    def __init__(
        self,
        pages: Store,
        cold: ColdFile | None = None,
        states: States | None = None,
        windows: Store | None = None,
        ahead: Sequence[Ahead] = (),
    ) -> None:
        self._pages = pages
        self._windows = windows
        self._states = states
        self._cold = cold
        self._ahead = ahead

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        windows = self._windows
        return self._pages.pages.page_bytes + (windows.pages.page_bytes if windows else 0)

    def use(self, *pages: int) -> None:
        """All pages below the first number may have been handed out, and all window pages below
        the second."""
        for ahead, number in zip(self._ahead, pages, strict=False):
            ahead.use(number)

    def rest(self) -> bool:
        """Do a little for pages to come; False if there is nothing to do. Not while others move or
        write pages."""
        return any(ahead.rest() for ahead in self._ahead)

    def move(self, moves: Sequence[tuple[Move, int, int]]) -> None:
        """Make a step's moves, in order."""
        discarded: list[int] = []
        for kind, source, target in moves:
            if kind is not Move.DISCARD and discarded:
                self._discard(discarded)  # before anything is put where they were
                discarded = []
            if kind is Move.RESUME:
                assert self._states is not None
                self._states.copy(source, target)
            elif kind is Move.DISCARD:
                discarded.append(source)
            elif kind in (Move.COPY, Move.COPY_WINDOW):
                self._store(kind).pages.copy(source, target)
            elif kind in (Move.DEMOTE, Move.DEMOTE_WINDOW):
                self._store(kind).demote(source, self._block(kind, target))
            else:
                self._store(kind).restore(self._block(kind, source), target)
        if discarded:
            self._discard(discarded)

    def _discard(self, pages: list[int]) -> None:
        for ahead in self._ahead:
            ahead.stop()
        self._pages.pages.discard(pages)

    def close(self) -> None:
        """Forget the cold pages."""
        self._cold = None

    def _store(self, kind: Move) -> Store:
        if kind not in WINDOW_MOVES:
            return self._pages
        assert self._windows is not None
        return self._windows

    def _block(self, kind: Move, slot: int) -> Bytes:
        """Where a page lies in a cold slot, or what lies beside it."""
        assert self._cold is not None
        first = self._pages.cold_bytes
        part = slice(first, None) if kind in WINDOW_MOVES else slice(first)
        return self._cold.pages[slot, part]
