"""Connections whose requests have to come in time, and do not begin with more than a few headers.

Nobody has shown a key yet while a request's head comes, so what it may take is bounded here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of a request's line and headers, and of what comes beside a body: trailers, extensions of chunks.
MAX_HEAD_BYTES = 64 << 10
# Until a head is whole, and between two pieces of a body.
HEAD_SECONDS, BODY_SECONDS = 30.0, 60.0
TOO_LARGE = "431 Request Header Fields Too Large", "the request's headers are too large"
TOO_SLOW = "408 Request Timeout", "the request did not come in time"


class Connection(HttpToolsProtocol):
    """One of uvicorn's connections, with these bounds."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        # Of what is no body: of a head, or since the last piece of a body.
        self._beside = 0
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._beside += len(data)
        if not self._in_head:
            self._wait(BODY_SECONDS)
        elif self._deadline is None:
            self._wait(HEAD_SECONDS)
        super().data_received(data)
        if self._beside > MAX_HEAD_BYTES:
            self._refuse(*TOO_LARGE)

    def on_message_begin(self) -> None:
        self._wait(HEAD_SECONDS)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer says nothing that anybody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._beside = False, 0
        self._wait(BODY_SECONDS)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._beside = True, 0
        self._wait(None)
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._wait(None)
        super().handle_websocket_upgrade()

    def _wait(self, seconds: float | None) -> None:
        """From now on the next thing may take so long; None if nothing has to come."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        # It is we who do not take what came, or the answer to the request before is under way.
        answering = self._in_head and self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or answering:
            self._wait(BODY_SECONDS)
        else:
            self._refuse(*TOO_SLOW)

    def _refuse(self, status: str, reason: str) -> None:
        """Say so, unless an answer is under way, and close."""
        self._wait(None)
        if self.transport.is_closing():
            return
        cycle, free = self.cycle, True
        if cycle is not None:
            # While a head comes, the cycle is that of the request before.
            free = cycle.response_complete if self._in_head else not cycle.response_started
        if free:
            body = f'{{"error":{{"message":"{reason}","type":"invalid_request_error"}}}}'
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            text = f"{head}content-length: {len(body)}\r\n\r\n{body}"
            self.transport.write(text.encode("ascii"))
        self.transport.close()
