"""What comes over the wire: requests by path and status, how long they take, who is connected."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import Metric
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.figures import SECONDS, Histogram, Limited, counter, gauge
from server.streams import MIDDLE

# Codes that clients can be answered with number fewer; whatever comes, no more series than this.
MOST_SERIES = 400


class Traffic:
    """Counts; `Watch` fills it in."""

    def __init__(self) -> None:
        self.requests = Limited(MOST_SERIES)
        self.seconds = Histogram(SECONDS)
        self.open: Counter[tuple[str]] = Counter({("http",): 0, ("websocket",): 0})
        self.left = 0

    def collect(self) -> Iterator[Metric]:
        """Its metrics as they stand."""
        text = "Requests by path of the API and status; a WebSocket's status is 101"
        yield counter("ryzanstein_http_requests", text, self.requests, ["path", "status"])
        yield self.seconds.family("ryzanstein_http_request_seconds", "Arrival to the last byte")
        yield gauge("ryzanstein_connections", "Requests and sockets open", self.open, ["kind"])
        yield counter("ryzanstein_clients_left", "Connections that ended early", float(self.left))


class Watch:
    """ASGI middleware, outermost, so that what is refused counts, too."""

    def __init__(
        self, app: ASGIApp, traffic: Traffic, routes: Callable[[], list[BaseRoute]]
    ) -> None:
        self._app = app
        self._traffic = traffic
        self._routes = routes
        self._paths: dict[Any, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        traffic, begun, status, whole = self._traffic, time.monotonic(), 0, kind == "websocket"

        async def noted(message: Message) -> None:
            nonlocal status, whole
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    status = message["status"]
                case "websocket.accept":
                    status = 101
                case "http.response.body":
                    whole = not message.get("more_body", False)
            await send(message)

        if kind == "http":
            scope[MIDDLE] = send
        traffic.open[kind,] += 1
        try:
            await self._app(scope, receive, noted)
        finally:
            scope.pop(MIDDLE, None)  # it leads back to the scope
            traffic.open[kind,] -= 1
            traffic.requests.add((self._path(scope), str(status or 499)))
            if kind == "http":
                traffic.seconds.observe(time.monotonic() - begun)
            if not whole or not status:
                traffic.left += 1

    def _path(self, scope: Scope) -> str:
        """The route's path with its parameters' names; one name for all that lead nowhere."""
        if not self._paths:
            self._paths = {route.endpoint: route.path for route in self._routes()}  # type: ignore[attr-defined]
        return self._paths.get(scope.get("endpoint"), "unknown")
