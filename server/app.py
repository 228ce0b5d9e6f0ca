"""The Starlette application: routes, error handlers, and the engine's life around it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from engine import AsyncEngine, RyzansteinError
from engine.config import BatchSection, LoggingSection, ServerSection, TracingSection
from engine.embedding.embedder import Embedder
from engine.types import MonotonicClock
from server import (
    console,
    embeddings,
    health,
    messages,
    openai,
    openapi,
    responses,
    session,
    telemetry,
    timeline,
    usage,
    websocket,
)
from server.batches import routes as files
from server.batches.answers import Answers
from server.batches.service import open_batches
from server.bridge.endpoint import Endpoint
from server.bridge.servers import Servers, read_servers
from server.errors import HTTPError, error_response
from server.journal import RequestLog
from server.rates import RATE_HEADERS, rate_headers
from server.security import Guard, refuse_socket
from server.store import Store
from server.streams import ClientLeft
from server.tenants import Directory
from server.tracing import Tracing, sampler_of
from server.traffic import Traffic, Watch

logger = logging.getLogger("ryzanstein.server")

# What a client that left would have got; nobody reads it (nginx's number for it).
CLIENT_CLOSED_REQUEST = 499
DEFAULT_LOGGING, DEFAULT_TRACING = LoggingSection(), TracingSection()
# How long an exit waits for traces to be sent.
FLUSH_SECONDS = 5.0


class LoadingStopped(Exception):
    """Raised inside loading once somebody has asked to stop."""


class Lifecycle:
    """Loads the engine in the background, and drains it when asked to stop."""

    def __init__(
        self,
        engine: AsyncEngine,
        drain_seconds: float,
        *,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self.on_stop: Callable[[], None] = lambda: None
        self._drain_seconds = drain_seconds
        self._on_loaded = on_loaded
        self._stop = anyio.Event()
        self._drain: anyio.CancelScope | None = None

    @property
    def stopping(self) -> bool:
        """Whether somebody has asked to stop; loading looks here and gives up."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask for a drain; a second call ends it. Call it on the event loop."""
        if self._drain is not None:
            self._drain.cancel()
        self._stop.set()

    async def run(self) -> None:
        """Load, serve until asked to stop, drain. Whatever goes wrong here ends the server."""
        gc.disable()  # loading makes little garbage, and more and more that is none
        try:
            async with self.engine:
                # A later collection that looked at all of it would hold up every stream.
                gc.collect()
                gc.freeze()
                gc.enable()
                self._on_loaded()
                if await self._stop_or_failure():
                    return
                if running := self.engine.active_requests:
                    logger.warning(
                        "stopping: what runs (%d) has %g s to end; another signal ends it now",
                        running,
                        self._drain_seconds,
                    )
                else:
                    logger.info("stopping")
                with anyio.CancelScope() as self._drain:
                    await self.engine.drain(self._drain_seconds)
        except LoadingStopped:
            logger.info("stopped while loading")
        except RyzansteinError as error:
            self.failure = error
        except Exception as error:
            logger.error("the server cannot go on", exc_info=error)
            self.failure = error
        finally:
            gc.enable()
            self.on_stop()

    async def _stop_or_failure(self) -> bool:
        """Wait until asked to stop, or until the engine has failed for good; whether it has."""

        async def watch() -> None:
            self.failure = await self.engine.failure()
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await self._stop.wait()
            group.cancel_scope.cancel()
        return self.failure is not None


def create_app(
    lifecycle: Lifecycle,
    settings: ServerSection,
    logs: LoggingSection = DEFAULT_LOGGING,
    tracing: TracingSection = DEFAULT_TRACING,
    embedder: Embedder | None = None,
    batches: BatchSection | None = None,
) -> Starlette:
    """The application; it answers health checks at once and everything else when loaded. Whoever
    gives it an `embedder` loads that with the engine.

    Raises ConfigError if a file that the settings name is wrong.
    """
    file = Path(settings.tenants_file) if settings.tenants_file else None
    directory = Directory(settings.api_keys, file)
    lifecycle.engine.configure_tenants(directory.tenants)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group, app.state.store.open(), mcp.open():
            group.start_soon(lifecycle.run)
            if app.state.batches is not None:
                group.start_soon(app.state.batches.run)
            group.start_soon(app.state.metrics.watch)
            group.start_soon(directory.watch, lifecycle.engine.configure_tenants)
            yield
            group.cancel_scope.cancel()
        if app.state.batches is not None:
            app.state.batches.close()
        if embedder is not None:
            await anyio.to_thread.run_sync(embedder.close)
        if app.state.tracing is not None:
            with anyio.move_on_after(FLUSH_SECONDS):
                await anyio.to_thread.run_sync(app.state.tracing.close, abandon_on_cancel=True)

    def rates(tenant: str) -> dict[str, str]:
        return rate_headers(lifecycle.engine, tenant)

    traffic = Traffic()
    # What changes bodies has no place here: those of event streams go past it (`streams.MIDDLE`).
    middleware = [
        Middleware(Watch, traffic=traffic, routes=lambda: routes),
        Middleware(
            Guard,
            settings=settings,
            directory=directory,
            rates=rates,
            max_file_bytes=0 if batches is None else batches.max_file_bytes,
            sampler=sampler_of(tracing),
        ),
    ]
    if settings.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "x-trace-id",
                "x-trace-sampled",
                "retry-after",
                "x-should-retry",
                *RATE_HEADERS,
            ],
        )
        middleware.insert(1, cors)
    mcp = Endpoint(lifecycle.engine, embedder, settings.max_body_bytes)
    routes: list[BaseRoute] = [
        Route("/", console.page, methods=["GET"]),
        Route("/console/{name}", console.asset, methods=["GET"]),
        Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", responses.count_tokens, methods=["POST"]),
        Route("/v1/responses/{id}", responses.one, methods=["GET", "DELETE"]),
        Route("/v1/responses/{id}/cancel", responses.cancel, methods=["POST"]),
        Route("/v1/responses/{id}/input_items", responses.input_items, methods=["GET"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/v1/files", files.create_file, methods=["POST"]),
        Route("/v1/files", files.list_files, methods=["GET"]),
        Route("/v1/files/{id}", files.one_file, methods=["GET", "DELETE"]),
        Route("/v1/files/{id}/content", files.file_content, methods=["GET"]),
        Route("/v1/batches", files.create_batch, methods=["POST"]),
        Route("/v1/batches", files.list_batches, methods=["GET"]),
        Route("/v1/batches/{id}", files.one_batch, methods=["GET"]),
        Route("/v1/batches/{id}/cancel", files.cancel_batch, methods=["POST"]),
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        Route("/v1/models", openai.list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", openai.get_model, methods=["GET"]),
        Route("/v1/usage/{id}", usage.get_usage, methods=["GET"]),
        Route("/v1/requests/{id}/timeline", timeline.get_timeline, methods=["GET"]),
        Route("/mcp", mcp, methods=["GET", "POST", "DELETE"]),
        Route("/tokenize", openai.tokenize, methods=["POST"]),
        Route("/detokenize", openai.detokenize, methods=["POST"]),
        Route("/openapi.json", openapi.openapi, methods=["GET"]),
        Route("/health/live", health.live, methods=["GET"]),
        Route("/health/ready", health.ready, methods=["GET"]),
        Route("/metrics", telemetry.metrics, methods=["GET"]),
        WebSocketRoute("/v1/responses", session.responses_socket),
        WebSocketRoute("/v1/stream", websocket.stream_endpoint),
        WebSocketRoute("/v1/console", console.feed),
        WebSocketRoute("/{path:path}", NoSocket()),
    ]
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            HTTPException: _http_exception,
            HTTPError: _known_error,
            RyzansteinError: _known_error,
            ClientDisconnect: _client_left,
            ClientLeft: _client_left,
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )
    app.state.engine = lifecycle.engine
    app.state.directory = directory
    app.state.metrics = telemetry.Metrics(lifecycle.engine, traffic)
    app.state.embedder = embedder
    app.state.batches = None
    app.state.wants_batches = batches is not None and batches.enabled
    if batches is not None and batches.enabled:
        answers = Answers(lifecycle.engine, embedder)
        app.state.batches = open_batches(batches, lifecycle.engine, answers)
        if app.state.batches is not None:
            # Once it all belonged to keys.
            app.state.batches.database.adopt(directory.owners)
    app.state.started = int(time.time())
    app.state.settings = settings
    servers = Servers(read_servers(Path(settings.mcp_file))) if settings.mcp_file else None
    app.state.store = Store(lifecycle.engine, settings, servers)
    app.state.usage = usage.UsageBook()
    app.state.timelines = timeline.Timelines(MonotonicClock().now)
    lifecycle.engine.add_listener(app.state.metrics)
    lifecycle.engine.add_listener(app.state.usage)
    lifecycle.engine.add_listener(app.state.timelines)
    app.state.console = console.Feed(lifecycle.engine)
    lifecycle.engine.add_listener(app.state.console)
    app.state.tracing = None
    if tracing.endpoint:
        app.state.tracing = Tracing(lifecycle.engine, app.state.timelines, tracing)
        lifecycle.engine.add_listener(app.state.tracing)
        if servers is not None:
            servers.on_call = app.state.tracing.on_tool_call
    app.state.metrics.tracing = app.state.tracing
    if logs.requests or logs.prompts:
        lifecycle.engine.add_listener(RequestLog(lifecycle.engine if logs.prompts else None))
    return app


async def _known_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


class NoSocket:
    """What answers sockets at paths that have none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        nothing = f"there is no WebSocket at {scope['path'][:200]!r}"
        await refuse_socket(scope, receive, send, HTTPError(404, nothing, code="not_found"))


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message, code = f"there is nothing at {request.url.path[:200]!r}", "not_found"
    elif error.status_code == 405:
        message, code = f"{request.method} is not allowed here", "method_not_allowed"
    else:
        message, code = error.detail, "invalid_request"
    headers = dict(error.headers or {})
    known = HTTPError(error.status_code, message, code=code, headers=headers)
    return error_response(known, request.url.path)


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("request %s failed", request.state.request_id, exc_info=error)
    return error_response(error, request.url.path)
