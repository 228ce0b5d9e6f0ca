"""An HTTP client that takes no more than it was told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx2


class TooLarge(httpx2.ReadError):
    """More came than is taken."""


class Counted(httpx2.AsyncByteStream):
    """A response's body, counted."""

    def __init__(self, stream: httpx2.AsyncByteStream, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._budget.take(len(chunk))
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class Budget:
    """Bytes that may still come, in all responses together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most

    def take(self, count: int) -> None:
        """Raises TooLarge once there is nothing left."""
        self._left -= count
        if self._left < 0:
            raise TooLarge(f"it sent more than {self._most} bytes")


class LimitedTransport(httpx2.AsyncHTTPTransport):
    """Counts what comes, as it comes; compressed data is not asked for, nor taken."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._budget = Budget(most)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise TooLarge("it sent compressed data, which was not asked for")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = Counted(response.stream, self._budget)
        return response


def limited_http(headers: Mapping[str, str], seconds: float, most: int) -> httpx2.AsyncClient:
    """A client for one server, which is not led to another."""
    return httpx2.AsyncClient(
        headers={**headers, "accept-encoding": "identity"},
        timeout=seconds,
        transport=LimitedTransport(most),
        follow_redirects=False,
    )
