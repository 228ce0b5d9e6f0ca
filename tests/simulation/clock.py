"""An event loop whose time is virtual: sleeping costs nothing, and every run is the same."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class VirtualSelector(selectors.DefaultSelector):
    """Looks whether anything is readable; if not, the clock moves on by the timeout."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().select(None)  # only a thread can wake the loop now
        events = super().select(0)
        if not events:
            self.time += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that lives in virtual time; also the engine's clock."""

    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.time

    def now(self) -> float:
        """Virtual seconds."""
        return self._virtual.time
