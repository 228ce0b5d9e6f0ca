"""The console: a page at `/`, and what its live view of the engine is fed with.

The page is three small modules without a build step; it loads nothing from elsewhere, and a content
security policy sees to that. Snapshots are made only while somebody looks, a few times a second.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp
from starlette.websockets import WebSocket, WebSocketDisconnect

from engine import AsyncEngine, RequestStats, StepStats
from server.errors import HTTPError

FILES = Path(__file__).parent / "console_files"
KINDS = {".css": "text/css", ".js": "text/javascript", ".html": "text/html"}
PROTOCOL = "ryzanstein.console"
SNAPSHOT_SECONDS = 0.2
# Pages that are shown one by one; of a larger pool every n-th is looked at.
MOST_CELLS = 2048
FREE, CACHED, OWNED = 0, 1, 2
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def page(request: Request) -> ASGIApp:
    """`GET /`."""
    return FileResponse(FILES / "index.html", headers=HEADERS)


async def asset(request: Request) -> ASGIApp:
    """`GET /console/{name}`."""
    name = request.path_params["name"]
    known = {file.name: file for file in FILES.iterdir() if file.suffix in KINDS}
    if name not in known:
        raise HTTPError(404, "there is no such file", code="not_found")
    return FileResponse(known[name], headers=HEADERS, media_type=KINDS[known[name].suffix])


class Feed:
    """A listener of one engine that adds up steps between snapshots while somebody looks."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.viewers = 0
        self._tokens = self._steps = self._preempted = self._rows = 0
        self._seconds = 0.0
        self._latest: bytes = b"{}"
        self._made_at = 0.0

    def on_step(self, stats: StepStats) -> None:
        """Add a step."""
        if not self.viewers:
            return
        self._tokens += stats.decode_rows + stats.accepted + stats.prefill_tokens
        self._steps += 1
        self._rows += bool(stats.decode_rows)
        self._seconds += stats.seconds.get("wait", 0.0)
        self._preempted += sum(decision.kind == "preempt" for decision in stats.decisions)

    def on_request(self, stats: RequestStats) -> None:
        """Requests are seen in the batch."""

    def snapshot(self) -> bytes:
        """What there is now, as JSON; one for all who look."""
        now = anyio.current_time()
        if now - self._made_at < 0.9 * SNAPSHOT_SECONDS:
            return self._latest
        passed, self._made_at = now - self._made_at, now
        scheduler = self._engine.parts.scheduler
        queue = [
            {"tenant": tenant, "waiting": len(account.waiting)}
            for tenant, account in scheduler.queue.accounts.items()
            if account.waiting
        ]
        step = 1e3 * self._seconds / self._steps if self._steps else 0.0
        self._latest = msgspec.json.encode(
            {
                "tokens_per_second": self._tokens / min(passed, 1.0),
                "step_ms": step,
                "next_token_ms": step if self._rows else 0.0,
                "preempted": self._preempted,
                "waiting": len(scheduler.queue),
                "running": [
                    {
                        "id": sequence.request.id,
                        "index": sequence.index,
                        "slot": sequence.slot,
                        "kind": "decode" if sequence.decoding else "prefill",
                    }
                    for sequence in scheduler.running
                ],
                "queue": queue[:50],
                "pages": self._pages(),
            }
        )
        self._tokens = self._steps = self._preempted = self._rows = 0
        self._seconds = 0.0
        return self._latest

    def _pages(self) -> dict[str, Any]:
        """Counts, and a byte for each cell: free, cached, or whose it is."""
        scheduler = self._engine.parts.scheduler
        pool = scheduler.pool
        every = -(-pool.total // MOST_CELLS)
        cells = bytearray(
            CACHED if pool.is_cached(page) else FREE for page in range(0, pool.total, every)
        )
        for sequence in scheduler.running:
            owner = OWNED + sequence.slot % (256 - OWNED)
            for page in sequence.pages:
                cells[page // every] = owner
        return {
            "total": pool.total,
            "used": pool.used,
            "cached": pool.cached,
            "cells": base64.b64encode(cells).decode(),
        }


async def feed(socket: WebSocket) -> None:
    """`GET /v1/console` with an upgrade: snapshots, for holders of the configuration's own keys."""
    # A browser that offered some wants one; a key that it offered is none to send back.
    chosen = PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", []) else None
    await socket.accept(chosen)
    if socket.state.tenant:
        await socket.close(1008, "only the operator's key shows this")
        return
    made: Feed = socket.app.state.console
    engine: AsyncEngine = socket.app.state.engine
    made.viewers += 1
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_until_left, socket, group.cancel_scope)
            while True:
                if engine.health() != "loading":
                    await socket.send_text(made.snapshot().decode())
                await anyio.sleep(SNAPSHOT_SECONDS)
    except* WebSocketDisconnect:
        pass  # it left while something was sent
    finally:
        made.viewers -= 1


async def _until_left(socket: WebSocket, scope: anyio.CancelScope) -> None:
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass
    scope.cancel()
