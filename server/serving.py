"""Runs the application under uvicorn, and drains it on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn
from rich.console import Console

from engine import AsyncEngine, Config, RyzansteinError
from engine.config import ServerSection
from engine.loading import load
from server.app import Lifecycle, create_app
from server.progress import StartupProgress, print_summary
from server.security import is_local

logger = logging.getLogger("ryzanstein.server")


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT drains while still answering; a second one stops at once."""

    def __init__(self, config: uvicorn.Config, begin_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._begin_drain = begin_drain
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Remember the loop, which signal handlers have to reach."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._draining or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)


def serve(config: Config, *, accept_terms: Callable[[str], bool], console: Console) -> int:
    """Serve until stopped; returns the process's exit status."""
    settings = config.server
    _warn_if_open(settings)
    started = time.perf_counter()
    with ExitStack() as bars:
        progress = bars.enter_context(StartupProgress(console))
        engine = AsyncEngine(
            lambda: load(config, progress=progress, accept_terms=accept_terms),
            stall_seconds=config.execution.stall_seconds,
        )

        def loaded() -> None:
            bars.close()
            port = _bound_port(server) or settings.port
            seconds = time.perf_counter() - started
            print_summary(console, engine.parts, settings.host, port, seconds)

        def stopped() -> None:
            server.should_exit = True

        lifecycle = Lifecycle(engine, settings.drain_seconds, on_loaded=loaded, on_stop=stopped)
        server = DrainingServer(_uvicorn_config(lifecycle, settings), lifecycle.stop)
        server.run()
    if lifecycle.failure is not None:
        raise lifecycle.failure
    if not server.started:
        raise RyzansteinError(f"cannot listen on {settings.host}:{settings.port}; see above")
    return 1 if engine.health() == "failed" else 0


def _uvicorn_config(lifecycle: Lifecycle, settings: ServerSection) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(lifecycle, settings),
        host=settings.host,
        port=settings.port,
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=settings.max_body_bytes,
        loop="uvloop",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def _bound_port(server: uvicorn.Server) -> int | None:
    """The port in use, which differs from the configured one if that is 0."""
    for listener in getattr(server, "servers", ()):
        for socket in listener.sockets:
            return int(socket.getsockname()[1])
    return None


def _warn_if_open(settings: ServerSection) -> None:
    if not is_local(settings.host) and not settings.api_keys:
        logger.warning(
            "ANYBODY who can reach %s:%d can use this server: it listens beyond this machine and "
            "has no API keys. Set server.api_keys, or listen on 127.0.0.1.",
            settings.host,
            settings.port,
        )
