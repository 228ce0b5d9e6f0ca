"""The short way of events to a connection: the same bytes, and the long way where it must be."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import uvicorn

from engine.config import ServerSection
from server.chunked import CONNECTION, Connected, chunks_of
from server.streams import DONE, EventStream, Put, completed

Produce = Callable[[Put], Awaitable[None]]


class Application:
    """Answers with an event stream, and counts the messages that bodies come in."""

    def __init__(self, produce: Produce, settings: ServerSection | None = None) -> None:
        self._produce = produce
        self._settings = settings or ServerSection()
        self.messages = 0
        self.ended = anyio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            self.messages += message["type"] == "http.response.body"
            await send(message)

        stream = EventStream(self._produce, {}, self.ended.set, settings=self._settings, last=DONE)
        await stream(scope, receive, counted)
        assert CONNECTION not in scope or chunks_of(scope) is not None


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, [listener])
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True


def events(count: int, size: int = 1) -> Produce:
    async def produce(put: Put) -> None:
        for number in range(count):
            await completed(put(b"data: %d %s\n\n" % (number, b"x" * size)))
            await anyio.lowlevel.checkpoint()

    return produce


def body_of(count: int, size: int = 1) -> bytes:
    return b"".join(b"data: %d %s\n\n" % (n, b"x" * size) for n in range(count)) + DONE


async def test_events_come_as_they_would_in_messages_but_in_none() -> None:
    bodies = []
    for wrap, messages in ((Connected, 1), (lambda app: app, 42)):
        app = Application(events(40))
        async with served(wrap(app)) as url, httpx.AsyncClient() as client:
            for _ in range(2):  # the connection is good for another
                answer = await client.get(url)
                assert answer.headers["transfer-encoding"] == "chunked"
                bodies.append(answer.content)
        assert app.messages == 2 * messages
    assert bodies == [body_of(40)] * 4


async def test_a_slow_client_gets_all_in_order() -> None:
    app = Application(events(300, 20_000))
    async with (
        served(Connected(app)) as url,
        httpx.AsyncClient() as client,
        client.stream("GET", url) as answer,
    ):
        await anyio.sleep(0.3)
        assert not app.ended.is_set(), "it waits for the client"
        assert await answer.aread() == body_of(300, 20_000)
    assert app.messages > 1, "what has to wait is a message"


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    app = Application(events(3000, 20_000), ServerSection(slow_consumer_seconds=0.2))
    async with served(Connected(app)) as url:
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with anyio.fail_after(5):
                await app.ended.wait()


async def test_a_client_that_has_left_is_written_nothing() -> None:
    left = anyio.Event()

    async def produce(put: Put) -> None:
        await completed(put(b"data: 1\n\n"))
        await left.wait()
        for _ in range(20):
            await completed(put(b"data: 2\n\n"))
            await anyio.sleep(0.005)

    app = Application(produce)
    async with served(Connected(app)) as url, httpx.AsyncClient() as client:
        async with client.stream("GET", url) as answer:
            assert await anext(answer.aiter_bytes()) == b"data: 1\n\n"
        left.set()
        with anyio.fail_after(5):
            await app.ended.wait()


def test_other_servers_have_no_short_way() -> None:
    async def send(message: Any) -> None: ...

    assert chunks_of({}) is None
    assert chunks_of({CONNECTION: send}) is None
