"""One HTTP/1.1 request, and when each piece of its answer came.

A client that measures shares its machine with the server that it measures: this one costs a few
microseconds a piece, where a general library costs some hundred.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools


@dataclass
class Answer:
    """A response; each piece of its body with the `time.perf_counter()` at which it came."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def text(self) -> str:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces).decode(errors="replace")

    def events(self) -> Iterator[tuple[float, bytes]]:
        """The data of server-sent events, one line each, and when the line was whole."""
        rest = b""
        for at, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield at, line[5:].strip()


class _Reader(asyncio.Protocol):
    """Sends a request when connected, and gathers what comes back until the answer is whole."""

    def __init__(self, request: bytes) -> None:
        self.answer = Answer()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ValueError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the connection was closed before the answer was whole"))

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.answer.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


async def post(url: str, headers: dict[str, str], body: bytes) -> Answer:
    """Send a JSON `body` over a connection of its own and read the whole answer. Raises OSError if
    the connection fails, ValueError if what comes back is no HTTP."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    if parts.hostname is None:
        raise ValueError(f"{url!r} names no host")
    lines = {
        "host": parts.netloc.rpartition("@")[2],
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    request = f"POST {parts.path or '/'} HTTP/1.1\r\n{head}\r\n".encode() + body
    transport, reader = await asyncio.get_running_loop().create_connection(
        lambda: _Reader(request),
        parts.hostname,
        parts.port or (443 if secure else 80),
        ssl=secure or None,
    )
    try:
        await reader.ended
    finally:
        transport.abort()
    return reader.answer
