"""What a connection may take before a request is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from server import connection
from server.connection import MAX_HEAD_BYTES, Connection

REQUEST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body, once it is whole."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body[:2], "more_body": True})
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    await send({"type": "http.response.body", "body": body[2:]})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.2)
    config = uvicorn.Config(echo, http=Connection, lifespan="off")
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


async def talk(port: int, *parts: bytes, pause: float = 0.05) -> bytes:
    """What comes back until the connection is closed, after these parts with pauses between."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.ensure_future(reader.read())
    try:
        for part in parts:
            if not answer.done():
                writer.write(part)
            await asyncio.sleep(pause)
        return await asyncio.wait_for(answer, 5)
    finally:
        writer.close()


def body_of(answer: bytes) -> bytes:
    """An answer's chunks together."""
    lines = answer.partition(b"\r\n\r\n")[2].split(b"\r\n")
    return b"".join(lines[1::2])


async def test_a_request_that_comes_in_pieces_is_answered(port: int) -> None:
    answer = await talk(port, REQUEST + b"Connection: close\r\n", b"\r\nab", b"cd")
    assert answer.startswith(b"HTTP/1.1 200")
    assert body_of(answer) == b"abcd"


async def test_two_requests_of_one_connection_have_their_time_each(port: int) -> None:
    whole = REQUEST + b"\r\nabcd"
    last = REQUEST + b"Connection: close\r\n\r\nefgh"
    answer = await talk(port, whole, whole, last, pause=0.15)
    assert answer.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    "endless", [b"X-Big: " + b"a" * MAX_HEAD_BYTES, b"X-Many: b\r\n" * (MAX_HEAD_BYTES // 10)]
)
async def test_a_head_without_end_is_refused(port: int, endless: bytes) -> None:
    assert (await talk(port, REQUEST, endless)).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("trailer", [b"x: y\r\n" * 20_000, b"x: " + b"y" * 100_000])
async def test_trailers_without_end_are_refused(port: int, trailer: bytes) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n"
    assert (await talk(port, head, trailer, trailer)).startswith(b"HTTP/1.1 431")


async def test_empty_lines_between_requests_keep_no_connection(port: int) -> None:
    answer = await talk(port, REQUEST + b"\r\nabcd", b"\r\n", b"\r\n")
    first, _, refused = answer.partition(b"HTTP/1.1 408")
    assert body_of(first) == b"abcd"
    assert refused


@pytest.mark.parametrize("part", [b"", REQUEST, REQUEST + b"\r\nab"])
async def test_who_does_not_go_on_is_told_so_and_left(port: int, part: bytes) -> None:
    assert (await talk(port, part)).startswith(b"HTTP/1.1 408")


async def test_an_answer_under_way_is_not_broken_by_what_comes_behind(port: int) -> None:
    slow = REQUEST.replace(b"/x", b"/slow") + b"\r\nabcd"
    answer = await talk(port, slow, REQUEST, pause=0.0)
    assert answer.startswith(b"HTTP/1.1 200")
    first, _, refused = answer.partition(b"HTTP/1.1 408")
    assert body_of(first) == b"abcd"
    assert refused


async def test_a_head_byte_by_byte_has_no_more_time(port: int) -> None:
    answer = await talk(port, *(bytes([byte]) for byte in REQUEST[:10]), pause=0.05)
    assert answer.startswith(b"HTTP/1.1 408")
