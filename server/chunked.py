"""The short way of an event stream's bytes to their connection.

A message for each token, through a coroutine of every layer between an application and its server,
costs several times what the token's text does. What `uvicorn` does with such a message, it does
here at once.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Where a request's scope has its server's own `send`.
CONNECTION = "ryzanstein.connection"
# What is looked at of uvicorn's, which another version might not have.
USED = ("transport", "response_started", "chunked_encoding")


class Connected:
    """ASGI application around another, which lets `chunks_of` find the connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[CONNECTION] = send
        try:
            await self._app(scope, receive, send)
        finally:
            scope.pop(CONNECTION, None)  # it leads back to the scope


class Chunks:
    """Parts of a response's body, in the chunked coding of HTTP/1.1 (RFC 9112, 7.1)."""

    __slots__ = ("_cycle", "_transport", "_under_way")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        # The response has begun, in chunks. From then on the transport alone is asked: each object
        # that a token has to do with costs memory's time.
        self._under_way = False

    def write(self, body: bytes) -> bool:
        """Write a part that is not empty. False if it has to be sent as a message: the response is
        not under way, or not chunked, or the client is slow, or has left."""
        transport = self._transport
        if transport.is_closing() or transport.get_write_buffer_size():
            return False
        if not self._under_way:
            self._under_way = self._cycle.response_started and bool(self._cycle.chunked_encoding)
            if not self._under_way:
                return False
        transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True


def chunks_of(scope: Scope) -> Chunks | None:
    """What writes to a request's connection; None under a server that has no such thing."""
    cycle = getattr(scope.get(CONNECTION), "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or not all(hasattr(cycle, n) for n in USED):
        return None
    return Chunks(cycle)
