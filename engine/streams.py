"""TokenStream: the mailbox between the engine's loop and one reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from engine.types import Delta


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
        # A bare future: an event object a token would cost more than the token's text.
        self._waiter: asyncio.Future[None] | None = None

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
        if delta.finish_reason is not None:
            self._open -= 1
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is pending."""
        self._error = error
        self._wake()

    async def receive(self) -> list[Delta]:
        """Everything since the last call, at most one delta per choice; empty at the end.

        Raises the stream's error once pending deltas have been read.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._open == 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pending, self._pending = self._pending, {}
        return list(pending.values())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while deltas := await self.receive():
            for delta in deltas:
                yield delta
