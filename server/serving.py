"""Runs the application under uvicorn, and drains it on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import uvicorn
from rich.console import Console

from engine import AsyncEngine, Config, ConfigError
from engine.config import ServerSection
from engine.embedding.alone import load_both
from engine.embedding.embedder import Embedder
from engine.parts import Parts
from server.app import Lifecycle, LoadingStopped, create_app
from server.chunked import Connected
from server.connection import Connection
from server.journal import open_journal
from server.progress import StartupProgress, print_summary
from server.security import is_local

logger = logging.getLogger("ryzanstein.server")


class DrainingServer(uvicorn.Server):
    """SIGTERM or SIGINT drains while still answering; a second ends the drain, a third exits."""

    def __init__(self, lifecycle: Lifecycle, settings: ServerSection, *more: Any) -> None:
        app = Connected(create_app(lifecycle, settings, *more))
        super().__init__(_uvicorn_config(app, settings))
        self._lifecycle = lifecycle
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, which signal handlers have to reach."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        self._signals += 1
        if self._signals > 2 or self._loop is None:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._lifecycle.stop)


def serve(config: Config, *, accept_terms: Callable[[str], bool], console: Console) -> int:
    """Serve until stopped; returns the process's exit status. Raises ConfigError if it cannot."""
    settings = config.server
    open_journal(config.logging)
    _warn_if_open(settings)
    started = time.perf_counter()
    with listen(settings) as listener, ExitStack() as bars:
        progress = bars.enter_context(StartupProgress(console))

        def report(stage: str, done: int, total: int) -> None:
            if lifecycle.stopping:
                raise LoadingStopped
            progress(stage, done, total)

        embedder = Embedder(config.embedding) if config.embedding.model else None

        def load_all() -> Parts:
            return load_both(config, embedder, progress=report, accept_terms=accept_terms)

        engine = AsyncEngine(
            load_all,
            stall_seconds=config.execution.stall_seconds,
            look_ahead=config.scheduler.look_ahead,
        )

        def loaded() -> None:
            bars.close()
            port = listener.getsockname()[1]
            seconds = time.perf_counter() - started
            keys = settings.asks_for_keys
            print_summary(console, engine.parts, settings.host, port, seconds, keys=keys)

        lifecycle = Lifecycle(engine, settings.drain_seconds, on_loaded=loaded)
        run(lifecycle, settings, listener, config.logging, config.tracing, embedder, config.batches)
    return 1 if engine.health() == "failed" else 0


def run(lifecycle: Lifecycle, settings: ServerSection, listener: socket.socket, *more: Any) -> None:
    """Serve on `listener` until a signal has drained the engine, or it could not be loaded; `more`
    is what `create_app` takes."""
    server = DrainingServer(lifecycle, settings, *more)
    logging.getLogger("uvicorn.error").addFilter(_is_news)

    def stop() -> None:
        server.should_exit = True

    lifecycle.on_stop = stop
    server.run([listener])
    if lifecycle.failure is not None:
        raise lifecycle.failure


def listen(settings: ServerSection) -> socket.socket:
    """The listening socket, taken before anything slow. Raises ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        unknown = error.errno is not None and error.errno < 0  # a name that nobody knows
        reason = os.strerror(error.errno) if error.errno and not unknown else str(error.strerror)
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; choose another "
            f"{'--host' if unknown else '--port'}"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # What a client that was given up never takes would otherwise keep its connection.
        patience = round(2e3 * settings.slow_consumer_seconds)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    return listener


def _uvicorn_config(app: Connected, settings: ServerSection) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="websockets-sansio",
        ws_max_size=settings.max_body_bytes,
        loop="uvloop",
        lifespan="on",
        log_config=None,  # its lines go where all go
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def _is_news(record: logging.LogRecord) -> bool:
    """uvicorn takes a refused handshake for a mistake of the application's."""
    return "returned without completing handshake" not in record.getMessage()


def _warn_if_open(settings: ServerSection) -> None:
    if not is_local(settings.host) and not settings.asks_for_keys:
        logger.warning(
            "ANYBODY who can reach %s:%d can use this server: it listens beyond this machine and "
            "has no API keys. Set server.api_keys or server.tenants_file, or listen on 127.0.0.1.",
            settings.host,
            settings.port,
        )
