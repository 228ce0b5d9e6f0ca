"""`/mcp`: the protocol's streamable HTTP. What speaks it is imported when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup, TaskStatus
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from engine import AsyncEngine
from engine.embedding.embedder import Embedder
from server.errors import HTTPError, error_response
from server.openai import ready_engine

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager


class Endpoint:
    """An ASGI application for one path; `open` surrounds its life."""

    def __init__(self, engine: AsyncEngine, embedder: Embedder | None, max_body_bytes: int) -> None:
        self._engine = engine
        self._embedder = embedder
        self._max_body = max_body_bytes
        self._lock = anyio.Lock()
        self._group: TaskGroup | None = None
        self._manager: StreamableHTTPSessionManager | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Requests are served within."""
        async with anyio.create_task_group() as self._group:
            yield
            self._group.cancel_scope.cancel()
        self._group = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            ready_engine(Request(scope))
        except HTTPError as error:
            await error_response(error)(scope, receive, send)
            return
        async with self._lock:
            if self._manager is None:
                assert self._group is not None
                self._manager = await self._group.start(self._serve)
        await self._manager.handle_request(scope, receive, send)

    async def _serve(
        self, *, task_status: TaskStatus[StreamableHTTPSessionManager] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        manager = await anyio.to_thread.run_sync(self._made)
        async with manager.run():
            task_status.started(manager)
            await anyio.sleep_forever()

    def _made(self) -> StreamableHTTPSessionManager:
        from server.bridge.inbound import make_manager

        # It tells of every request.
        logging.getLogger("mcp").setLevel(logging.WARNING)
        return make_manager(self._engine, self._embedder, self._max_body)
