"""Pages of the KV cache on the move: copies, the cold tier's file, memory that is given back."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.scheduling.plan import Move
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


class Cache:
    """All that holds KV pages: those of the device, and the cold tier behind them, where pages lie
    byte for byte, or as a `codec` makes them; and `states`, where layers keep some."""

    def __init__(
        self,
        pages: Pages,
        cold: ColdFile | None = None,
        codec: PageCodec | None = None,
        states: States | None = None,
    ) -> None:
        self._pages = pages
        self._states = states
        self._cold = cold
        self._codec = codec

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self._pages.page_bytes

    def move(self, moves: Sequence[tuple[Move, int, int]]) -> None:
        """Make a step's moves, in order."""
        discarded: list[int] = []
        for kind, source, target in moves:
            if kind is not Move.DISCARD and discarded:
                self._pages.discard(discarded)  # before anything is put where they were
                discarded = []
            if kind is Move.COPY:
                self._pages.copy(source, target)
            elif kind is Move.RESUME:
                assert self._states is not None
                self._states.copy(source, target)
            elif kind is Move.DISCARD:
                discarded.append(source)
            elif kind is Move.DEMOTE:
                self._demote(source, target)
            else:
                self._restore(source, target)
        if discarded:
            self._pages.discard(discarded)

    def close(self) -> None:
        """Forget the cold pages."""
        self._cold, self._codec = None, None

    def _demote(self, page: int, slot: int) -> None:
        assert self._cold is not None
        fill = self._pages.read if self._codec is None else self._codec.compress
        fill(page, self._cold.pages[slot])

    def _restore(self, slot: int, page: int) -> None:
        assert self._cold is not None
        make = self._pages.write if self._codec is None else self._codec.restore
        make(self._cold.pages[slot], page)
