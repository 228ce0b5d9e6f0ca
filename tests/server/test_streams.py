"""Event streams as ASGI: what is sent, and when a stream is given up."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import anyio

from engine.config import ServerSection
from server.streams import EventStream


async def frames(count: int, pause: float = 0.0) -> AsyncGenerator[bytes]:
    for number in range(count):
        await anyio.sleep(pause)
        yield b"%d" % number


async def never() -> dict[str, Any]:
    await anyio.sleep_forever()
    raise AssertionError


class Client:
    """Takes so many messages, then nothing."""

    def __init__(self, takes: float = float("inf")) -> None:
        self.bodies: list[bytes] = []
        self.takes = takes

    async def send(self, message: Any) -> None:
        if self.takes <= 0:
            await anyio.sleep_forever()
        self.takes -= 1
        self.bodies.append(message.get("body", b""))


async def test_a_stream_ends_with_done_and_nothing_behind_it() -> None:
    client, ends = Client(), []
    stream = EventStream(frames(2), {}, lambda: ends.append(1), settings=ServerSection())
    await stream({"type": "http"}, never, client.send)  # type: ignore[arg-type]
    assert client.bodies[1:] == [b"data: 0\n\n", b"data: 1\n\n", b"data: [DONE]\n\n", b""]
    assert ends == [1]


async def test_silence_is_broken() -> None:
    client = Client()
    settings = ServerSection(keepalive_seconds=0.05)
    stream = EventStream(frames(1, pause=0.3), settings=settings)
    await stream({"type": "http"}, never, client.send)  # type: ignore[arg-type]
    assert client.bodies.count(b": keep-alive\n\n") >= 3


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    client, ends = Client(takes=3), []
    settings = ServerSection(slow_consumer_seconds=0.1)
    stream = EventStream(frames(50), {}, lambda: ends.append(1), settings=settings)
    with anyio.fail_after(2):
        await stream({"type": "http"}, never, client.send)  # type: ignore[arg-type]
    assert client.bodies[1:] == [b"data: 0\n\n", b"data: 1\n\n"]
    assert ends == [1]
