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
    credit: int | None = None
    _granted: anyio.Event = field(default_factory=anyio.Event)

    @property
    def is_idle(self) -> bool:
        """Whether it may be forgotten."""
        return not self.busy and not self.jobs

    def grant(self, events: int) -> None:
        """Let so many more events go out."""
        self.credit = (self.credit or 0) + events
        self._granted.set()

    async def take_credit(self) -> None:
        """Wait until one more event may go out."""
        while self.credit == 0:
            self._granted = anyio.Event()
            await self._granted.wait()
        if self.credit is not None:
            self.credit -= 1

    def return_credit(self) -> None:
        """The event did not come."""
        if self.credit is not None:
            self.grant(1)
