"""The measuring client: what it reads, when, and what it says where an answer is cut short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from perf.wire import Answer, post

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def answering(
    *pieces: bytes, pause: float = 0.0, closes: bool = True
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that sends `pieces` and closes; its address, and what it was asked."""
    asked: list[bytes] = []
    over = asyncio.Event()
    handlers: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(head + await reader.readexactly(length))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        if not closes:
            await over.wait()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}", asked
        over.set()
        await asyncio.gather(*(task for task in handlers if task))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_events_carry_the_time_at_which_their_line_was_whole() -> None:
    first, second = chunk(b'data: {"a"'), chunk(b": 1}\n\n: nothing\n\ndata: [DONE]\n\n")
    async with answering(HEAD + first, second, chunk(b""), pause=0.02) as (url, asked):
        answer = await post(f"{url}/v1/x", {"authorization": "Bearer k"}, b'{"b": 2}')
    (at, data), (end, last) = answer.events()
    assert (answer.status, data, last) == (200, b'{"a": 1}', b"[DONE]")
    assert at == end == answer.pieces[1][0] >= answer.pieces[0][0] + 0.01
    head, _, body = asked[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert b"authorization: Bearer k" in head
    assert body == b'{"b": 2}'


async def test_an_answer_with_a_length_is_whole_when_that_has_come() -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\n"
    async with answering(head + b"busy") as (url, _):
        answer = await post(url, {}, b"{}")
    assert (answer.status, answer.text()) == (429, "busy")


@pytest.mark.parametrize("sent", [b"", HEAD + chunk(b"data: 1\n")])
async def test_an_answer_that_is_cut_short_is_an_error(sent: bytes) -> None:
    async with answering(sent) as (url, _):
        with pytest.raises(ConnectionError, match="before the answer was whole"):
            await post(url, {}, b"{}")


async def test_what_is_no_http_is_an_error() -> None:
    async with answering(b"SSH-2.0-OpenSSH_9.2\r\n") as (url, _):
        with pytest.raises(ValueError, match="the answer is not HTTP"):
            await post(url, {}, b"{}")


async def test_waiting_for_an_answer_can_be_given_up() -> None:
    async with answering(closes=False) as (url, _):
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.05):
                await post(url, {}, b"{}")


def test_no_address_is_an_error() -> None:
    assert list(Answer().events()) == []
    with pytest.raises(ValueError, match="names no host"):
        anyio.run(post, "/v1", {}, b"{}")
