"""Event streams as ASGI: what is sent, and when a stream is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from engine.config import ServerSection
from server.streams import DONE, EventStream, Put, begun, completed


def frames(count: int, pause: float = 0.0) -> Callable[[Put], Awaitable[None]]:
    async def produce(put: Put) -> None:
        for number in range(count):
            await anyio.sleep(pause)
            await completed(put(b"data: %d\n\n" % number))

    return produce


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
    stream = EventStream(frames(2), {}, lambda: ends.append(1), settings=ServerSection(), last=DONE)
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


async def test_work_that_need_not_wait_is_done_at_once() -> None:
    done: list[str] = []

    async def work() -> None:
        done.append("work")

    assert begun(work(), lambda: done.append("then")) is None
    assert done == ["work", "then"]


async def test_work_that_waits_goes_on_in_the_task_that_awaits_it() -> None:
    gate, done = asyncio.Event(), []

    async def work() -> None:
        for _ in range(2):
            await gate.wait()
            gate.clear()
        done.append("work")

    rest = begun(work(), lambda: done.append("then"))
    assert rest is not None
    task = asyncio.create_task(completed(rest))
    for _ in range(2):
        assert done == []
        gate.set()
        await anyio.sleep(0.001)
    await task
    assert done == ["work", "then"]


async def test_work_that_is_given_up_is_told_so() -> None:
    ends: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("work")

    rest = begun(work(), lambda: ends.append("then"))
    with anyio.move_on_after(0.01):
        await completed(rest)
    assert ends == ["work"]


async def test_an_error_at_once_is_the_callers() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        begun(work(), lambda: None)
