"""Lanes of a WebSocket: what waits in each, and how many events its client is ready for."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio

from server.store import Record

# Starts one request in the lane that it was sent to.
Job = Callable[[str | None], Awaitable[Record]]


@dataclass(eq=False)
class Lane:
    """One `stream_id`. Credit counts once the client has given some; before that nothing waits."""

    jobs: deque[Job] = field(default_factory=deque)
    busy: bool = False
    used: bool = False
    readers: int = 0
    credit: int | None = None
    _granted: anyio.Event = field(default_factory=anyio.Event)

    @property
    def is_idle(self) -> bool:
        """Whether it may be forgotten: nothing goes on, and no credit waits for what was not sent
        yet."""
        open_credit = self.credit is not None and not self.used
        return not (self.busy or self.jobs or self.readers or open_credit)

    def grant(self, events: int) -> None:
        """Let so many more events go out."""
        self.credit = (self.credit or 0) + events
        self._granted.set()
        self._granted = anyio.Event()

    async def take_credit(self) -> None:
        """Wait until one more event may go out."""
        while self.credit == 0:
            await self._granted.wait()
        if self.credit is not None:
            self.credit -= 1
