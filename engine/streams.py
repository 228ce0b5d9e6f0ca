"""TokenStream: the mailbox between the engine's loop and one reader."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable
from operator import attrgetter

from engine.types import Delta


class Waiter:
    """What one task waits for. A bare future: an event object a token would cost more than the
    token's text."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def next(self) -> asyncio.Future[None]:
        """What is done at the next `wake`."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
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


Taker = Callable[[list[Delta]], Awaitable[None] | None]


class TokenStream:
    """Deltas of one or several requests' choices, coalesced until they are read.

    The engine's `push` never blocks: it merges into the pending delta of its choice, so a reader
    however slow costs at most its own output. Ends when every choice has finished, or with
    the error given to `fail`.
    """

    # One piece of memory: what a token needs of a stream has left the caches since the last one.
    __slots__ = (
        "_broken",
        "_choices",
        "_error",
        "_full",
        "_on_full",
        "_open",
        "_pending",
        "_rest",
        "_taker",
        "_waiter",
        "request_ids",
    )

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self._choices = 0
        self._open = 0
        # In the order of their choices.
        self._pending: list[Delta] = []
        self._error: Exception | None = None
        self._full = 0
        self._on_full: Callable[[], None] | None = None
        self._waiter = Waiter()
        # Set while `pour` waits for deltas; what has to be awaited before it does again, or raised.
        self._taker: Taker | None = None
        self._rest: Awaitable[None] | None = None
        self._broken: Exception | None = None

    def join(self, request_id: str, choices: int) -> int:
        """Let a request's choices push here; returns the index of its first."""
        first = self._choices
        self.request_ids.append(request_id)
        self._choices += choices
        self._open += choices
        return first

    def push(self, delta: Delta) -> bool:
        """Add what happened to one choice. True if nobody has been woken: `hand_out` has to be
        called soon, as a `Handout` does."""
        if not self._pending or self._pending[-1].index < delta.index:
            self._pending.append(delta)
        else:
            self._merge(delta)
        if delta.finish_reason is not None:
            self._open -= 1
        if self._taker is not None and self._open:
            return True
        self._waiter.wake()
        return False

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
        """Everything since the last call, a delta per choice at most, in order; empty at the end.

        Raises the stream's error once pending deltas have been read.
        """
        # What `ready` does: another coroutine a token would be felt.
        while not (self._pending or self._error or self._open == 0):
            await self._waiter.next()
        if not self._pending:
            if self._error is not None:
                raise self._error
            return []
        return self._take()

    async def pour(self, take: Taker) -> None:
        """Give `take` everything as it comes, to the end, without waking this task each time.

        It must return at once, and is called from the event loop's callbacks, too. While what it
        returned is awaited here, deltas are coalesced. Raises the stream's error, or its own.
        """
        while True:
            if self._pending:
                rest = take(self._take())
            elif self._error is not None:
                raise self._error
            elif self._open == 0:
                return
            else:
                rest = await self._passed_on(take)
            if rest is not None:
                await rest

    async def _passed_on(self, take: Taker) -> Awaitable[None] | None:
        """Have `hand_out` call `take`, until that is not enough; what has to be awaited first."""
        self._taker = take
        try:
            await self._waiter.next()
        finally:
            self._taker = None
        if self._broken is not None:
            raise self._broken
        rest, self._rest = self._rest, None
        return rest

    def hand_out(self) -> None:
        """Pass on what is pending, if `pour` waits for it."""
        if self._taker is None or not self._pending:
            return
        try:
            self._rest = self._taker(self._take())
        except Exception as error:  # noqa: BLE001  (raised where the stream is poured)
            self._broken = error
        if self._rest is not None or self._broken is not None:
            self._taker = None
            self._waiter.wake()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while deltas := await self.receive():
            for delta in deltas:
                yield delta

    def _merge(self, delta: Delta) -> None:
        """Add a delta that belongs before the end of those pending, or to one of them."""
        at = bisect_left(self._pending, delta.index, key=_index)
        pending = self._pending[at]
        if pending.index != delta.index:
            self._pending.insert(at, delta)
            return
        pending.merge(delta)
        if self._on_full is not None and len(pending.token_ids) >= self._full:
            on_full, self._on_full = self._on_full, None
            on_full()

    def _take(self) -> list[Delta]:
        pending, self._pending = self._pending, []
        return pending


_index = attrgetter("index")


class Handout:
    """Has streams pass on what they got, all together, once the engine's turn is over: what readers
    do with tokens must not hold the next step up."""

    def __init__(self) -> None:
        self._streams: list[TokenStream] = []

    def push(self, stream: TokenStream, delta: Delta) -> None:
        """Push to a stream, and remember if it has something to pass on."""
        if stream.push(delta):
            if not self._streams:
                asyncio.get_running_loop().call_soon(self._hand_out)
            self._streams.append(stream)

    def _hand_out(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.hand_out()
