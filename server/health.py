"""Health: live means the process makes progress; ready means that new requests will be served."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp

from engine import AsyncEngine
from server.errors import json_response


async def live(request: Request) -> ASGIApp:
    """`GET /health/live`: 503 if the engine has failed or a step hangs."""
    state = _engine(request).health()
    return json_response({"status": state}, 503 if state in ("failed", "stalled") else 200)


async def ready(request: Request) -> ASGIApp:
    """`GET /health/ready`: 200 only when loaded, neither draining nor broken, with a free place in
    the queue."""
    engine = _engine(request)
    state = engine.health()
    if state == "ok" and engine.admission.is_full:
        state = "overloaded"
    return json_response({"status": state}, 200 if state == "ok" else 503)


def _engine(request: Request) -> AsyncEngine:
    engine: AsyncEngine = request.app.state.engine
    return engine
