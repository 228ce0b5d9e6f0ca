"""One response's events, numbered when they are appended; every connection is a cursor in them."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec

# Events that a reader may be behind before nothing more is appended; what comes meanwhile joins
# into one event, however long it takes.
WINDOW = 32

Event = dict[str, Any]


class EventLog:
    """Events in the order of their `sequence_number`, from 0 without a gap, and who reads them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bytes]] = []
        self.bytes = 0
        self.closed = False
        self.unbounded = False
        self.readers: set[Cursor] = set()
        self._changed = anyio.Event()
        self._moved = anyio.Event()

    def append(self, event: Event) -> None:
        """Number an event and keep it, encoded; its `type` is beside it."""
        body = msgspec.json.encode({**event, "sequence_number": len(self.events)})
        self.events.append((event["type"], body))
        self.bytes += len(body)
        self._notify()

    def unbind(self) -> None:
        """Append whatever comes, whoever reads: the end is near."""
        self.unbounded = True
        self.moved()

    def close(self) -> None:
        """Nothing comes any more."""
        self.closed = True
        self._notify()

    @property
    def behind(self) -> int:
        """Events that the foremost reader has not taken; 0 while nobody reads, or near the end."""
        if self.unbounded or not self.readers:
            return 0
        return min(reader.behind for reader in self.readers)

    @property
    def has_room(self) -> bool:
        """Whether somebody keeps up, or nobody reads."""
        return self.behind < WINDOW

    @property
    def is_full(self) -> bool:
        """Whether a reader that fell behind has not caught up by half yet. Whoever takes an event
        now and then would otherwise start its request again for each."""
        return self.behind > WINDOW // 2

    async def movement(self) -> None:
        """Wait until a reader gets on, comes or goes, or the end is near."""
        self._moved = anyio.Event()
        await self._moved.wait()

    async def changed(self) -> None:
        """Wait until something was appended, or the log was closed."""
        await self._changed.wait()

    def moved(self) -> None:
        """A reader has got on, come or gone."""
        self._moved.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class Cursor:
    """One reader of a log, from behind `starting_after` on."""

    def __init__(self, log: EventLog, starting_after: int = -1) -> None:
        self._log = log
        self._next = starting_after + 1
        log.readers.add(self)

    @property
    def position(self) -> int:
        """The number of its next event."""
        return self._next

    @property
    def behind(self) -> int:
        """Events that it has not taken."""
        return len(self._log.events) - self._next

    async def ready(self) -> bool:
        """Wait until there is an event; False at the end."""
        while self._next >= len(self._log.events):
            if self._log.closed:
                return False
            await self._log.changed()
        return True

    async def next(self) -> tuple[str, bytes] | None:
        """The next event, as soon as there is one; None at the end."""
        return self.take() if await self.ready() else None

    def take(self) -> tuple[str, bytes]:
        """The event that is ready."""
        event = self._log.events[self._next]
        self._next += 1
        self._log.moved()
        return event

    def close(self) -> None:
        """Stop reading; a second call does nothing."""
        self._log.readers.discard(self)
        self._log.moved()
