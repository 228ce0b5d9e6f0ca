"""One generation, whatever the transport: submit, read deltas, and stop when the client leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from engine import AsyncEngine, InvalidRequest, SamplingParams, Terms, TokenStream
from engine.config import ServerSection
from server.chunked import Chunks, chunks_of
from server.errors import describe
from server.requests import Prompt

logger = logging.getLogger("ryzanstein.server")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# Where a request's scope has the `send` behind all middleware, which looks at nothing but an
# answer's start and end: what lies between, a message a token, goes past it.
MIDDLE = "ryzanstein.middle"


async def submit_all(
    engine: AsyncEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    request_id: str,
    terms: Terms,
) -> TokenStream:
    """Queue several prompts into one stream, in order; all or none."""
    sequences, room = len(prompts) * params.n, engine.parts.limits.max_waiting
    if sequences > room:
        raise InvalidRequest(
            f"{len(prompts)} prompts with n = {params.n} are {sequences} sequences, "
            f"but the queue holds {room}; ask for fewer at a time",
            param="n",
        )
    stream = TokenStream()
    try:
        for number, prompt in enumerate(prompts):
            await engine.submit(
                prompt,
                params,
                request_id=f"{request_id}-{number}" if number else request_id,
                terms=terms,
                stream=stream,
            )
    except BaseException:
        engine.abort(*stream.request_ids)
        raise
    return stream


@contextmanager
def reading(engine: AsyncEngine, stream: TokenStream) -> Iterator[None]:
    """Around whatever reads a stream: however it is left, the requests do not run on."""
    try:
        yield
    finally:
        engine.abort(*stream.request_ids)


class ClientLeft(Exception):
    """The client disconnected before the answer was complete."""


async def receive_text(socket: WebSocket) -> str | None:
    """The next message, None for a binary one; ClientLeft if nobody is there any more."""
    try:
        return await socket.receive_text()
    except WebSocketDisconnect as error:
        raise ClientLeft from error
    except KeyError:
        return None


async def send_text(socket: WebSocket, text: str) -> None:
    """Send a message; ClientLeft if nobody is there any more."""
    try:
        await socket.send_text(text)
    except (WebSocketDisconnect, RuntimeError) as error:
        # Starlette's complaint about a socket that was closed meanwhile is a RuntimeError.
        raise ClientLeft from error


async def race_disconnect(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`, but give it up when the client disconnects (ClientLeft)."""
    results: list[T] = []
    failures: list[Exception] = []

    async def run() -> None:
        try:
            results.append(await work())
        except Exception as error:  # noqa: BLE001  (raised again below, outside the group)
            failures.append(error)
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await _disconnected(request.receive)
        group.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        raise ClientLeft
    return results[0]


NO_HEADERS: Mapping[str, str] = MappingProxyType({})


Put = Callable[[bytes], Awaitable[None] | None]
"""Sends events, encoded and framed; what remains to be awaited, if the client is slow."""


class EventStream:
    """An ASGI response of server-sent events; ends early, and tidily, if the client leaves.

    `produce` is given what it puts its events into. An error on the way becomes an `error` event,
    by `failed`, and `last` comes behind it all. Comments break every silence of
    `keepalive_seconds`. A client that takes nothing for `slow_consumer_seconds` is given up.
    `on_end` is called however it ends, also if the client left before the first event.
    """

    __slots__ = (
        "_chunks",
        "_ended",
        "_failed",
        "_headers",
        "_last",
        "_middle",
        "_on_end",
        "_produce",
        "_sending",
        "_sent_at",
        "_settings",
    )

    def __init__(
        self,
        produce: Callable[[Put], Awaitable[None]],
        headers: Mapping[str, str] = NO_HEADERS,
        on_end: Callable[[], None] = lambda: None,
        *,
        settings: ServerSection,
        last: bytes = b"",
        failed: Callable[[Exception], bytes] | None = None,
    ) -> None:
        self._produce = produce
        self._last = last
        self._failed = failed or failed_event
        self._settings = settings
        self._chunks: Chunks | None = None
        self._sending = False
        self._ended = False
        self._sent_at = 0.0
        self._on_end = on_end
        self._headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._middle = scope.get(MIDDLE, send)
        self._chunks = chunks_of(scope)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._write, send, group.cancel_scope)
                group.start_soon(self._watch, group.cancel_scope)
                await _disconnected(receive)
                group.cancel_scope.cancel()
        finally:
            self._on_end()

    async def _write(self, send: Send, scope: anyio.CancelScope) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            try:
                await self._produce(self._put)
            except Exception as error:  # noqa: BLE001  (told to the client, and logged if it is ours)
                await completed(self._put(self._failed(error)))
            await completed(self._put(self._last))
            self._ended = True
            self._sending = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            scope.cancel()

    def _put(self, body: bytes) -> Awaitable[None] | None:
        if not body:
            return None
        if self._chunks is not None and not self._sending and self._chunks.write(body):
            self._sent_at = time.monotonic()
            return None
        self._sending = True
        message = {"type": "http.response.body", "body": body, "more_body": True}
        return begun(self._middle(message), self._sent)

    def _sent(self) -> None:
        self._sending = False
        self._sent_at = time.monotonic()

    async def _watch(self, scope: anyio.CancelScope) -> None:
        """Break silences; give up on a client that takes nothing of what is sent."""
        keepalive, patience = self._settings.keepalive_seconds, self._settings.slow_consumer_seconds
        self._sent_at = time.monotonic()
        while True:
            await anyio.sleep(min(keepalive, patience) / 2)
            silence = time.monotonic() - self._sent_at
            if self._sending and silence > patience:
                logger.warning("a client took nothing for %g s; its stream ends", patience)
                scope.cancel()
            elif not (self._sending or self._ended) and silence >= keepalive / 2:
                with anyio.move_on_after(patience) as limit:
                    await completed(self._put(b": keep-alive\n\n"))
                if limit.cancelled_caught:
                    scope.cancel()


async def completed(rest: Awaitable[None] | None) -> None:
    """Await what remains of something, if anything does."""
    if rest is not None:
        await rest


def begun(work: Awaitable[None], then: Callable[[], None]) -> Awaitable[None] | None:
    """Do as much as can be done at once, in whatever task this is, and `then` what follows it.
    What remains to be awaited, if the work has to wait."""
    steps = work.__await__()
    try:
        waits_for = next(steps)
    except StopIteration:
        then()
        return None
    return _Rest(steps, waits_for, then)


class _Rest:
    """Work that another task than the one that began it awaits."""

    def __init__(
        self, steps: Generator[Any, Any, None], waits_for: Any, then: Callable[[], None]
    ) -> None:
        self._steps = steps
        self._waits_for = waits_for
        self._then = then

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    yield waits_for
                except BaseException as error:  # noqa: BLE001  (the work's, as what is awaited is)
                    waits_for = self._steps.throw(error)
                else:
                    waits_for = next(self._steps)
        except StopIteration:
            self._then()


def event_of(body: Any) -> bytes:
    """An event without a name."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def failed_event(error: Exception) -> bytes:
    """What ends a stream of OpenAI's that failed midway."""
    status, body, _ = describe(error)
    if status == 500:
        logger.error("stream failed", exc_info=error)
    return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
