"""TokenStream: the mailbox between the engine's loop and one reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from engine.types import Delta


class Waiter:
    """What one task waits for. A bare future: an event object a token would cost more than the
    token's text."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    def next(self) -> asyncio.Future[None]:
        """What is done at the next `wake`."""
        self._future = asyncio.get_running_loop().create_future()
        return self._future

    async def wait(self, seconds: float | None = None) -> None:
        """Until the next `wake`, or for so long."""
        if seconds is None:
            await self.next()
            return
        timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self.wake)
        try:
            await self.next()
        finally:
            timer.cancel()

    def wake(self) -> None:
        """Let the task go on, if it waits."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class TokenStream:
    """Deltas of one or several requests' choices, coalesced until they are read.

    The engine's `push` never blocks: it merges into the pending delta of its choice, so a reader
    however slow costs at most its own output. Ends when every choice has finished, or with
    the error given to `fail`.
    """

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self._choices = 0
        self._open = 0
        self._pending: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._full = 0
        self._on_full: Callable[[], None] | None = None
        self._waiter = Waiter()

    def join(self, request_id: str, choices: int) -> int:
        """Let a request's choices push here; returns the index of its first."""
        first = self._choices
        self.request_ids.append(request_id)
        self._choices += choices
        self._open += choices
        return first

    def push(self, delta: Delta) -> None:
        """Add what happened to one choice."""
        pending = self._pending.get(delta.index)
        if pending is None:
            self._pending[delta.index] = delta
        else:
            pending.merge(delta)
            if self._on_full is not None and len(pending.token_ids) >= self._full:
                on_full, self._on_full = self._on_full, None
                on_full()
        if delta.finish_reason is not None:
            self._open -= 1
        self._waiter.wake()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be pushed."""
        return self._open == 0 or self._error is not None

    def when_full(self, tokens: int, then: Callable[[], None] | None) -> None:
        """Have `then` called once a delta of so many tokens waits for its reader; None for never.
        It must return at once."""
        self._full, self._on_full = tokens, then

    async def ready(self) -> None:
        """Wait until `receive` has something, or the end."""
        while not (self._pending or self._error or self._open == 0):
            await self._waiter.next()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is pending."""
        self._error = error
        self._waiter.wake()

    async def receive(self) -> list[Delta]:
        """Everything since the last call, at most one delta per choice; empty at the end.

        Raises the stream's error once pending deltas have been read.
        """
        # What `ready` does: another coroutine a token would be felt.
        while not (self._pending or self._error or self._open == 0):
            await self._waiter.next()
        if not self._pending:
            if self._error is not None:
                raise self._error
            return []
        pending, self._pending = self._pending, {}
        return list(pending.values())

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while deltas := await self.receive():
            for delta in deltas:
                yield delta
