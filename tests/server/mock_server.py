"""A server around the model without weights, for what has to be exact: text, timing, failures.

Settings come from the environment, so that a test can start it as a process of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.config import BatchSection, LoggingSection, ServerSection, TracingSection
from engine.parts import Parts
from server import serving
from server.app import Lifecycle, create_app
from server.journal import open_journal
from server.serving import listen
from tests.mock import mock_engine


def main() -> None:
    options = json.loads(os.environ.get("MOCK_ENGINE", "{}"))
    delay, loading = options.pop("delay", 0.0), options.pop("loading", 0.0)
    settings = ServerSection(**{"port": 0} | json.loads(os.environ.get("MOCK_SERVER", "{}")))
    logs = LoggingSection(**json.loads(os.environ.get("MOCK_LOGGING", "{}")))
    tracing = TracingSection(**json.loads(os.environ.get("MOCK_TRACING", "{}")))
    kept = os.environ.get("MOCK_BATCHES")
    batches = BatchSection(**json.loads(kept)) if kept else None
    open_journal(logs)
    engine, executor = mock_engine(**options)
    executor.delay = delay
    load_parts = engine._load_parts

    def load_slowly() -> Parts:
        time.sleep(loading)
        return load_parts()

    engine._load_parts = load_slowly

    async def fail_next_step(request: Request) -> Response:
        executor.error = RuntimeError("device lost")
        return JSONResponse({})

    async def raise_error(request: Request) -> Response:
        raise ZeroDivisionError("a secret detail")

    async def tasks(request: Request) -> Response:
        return JSONResponse(len(asyncio.all_tasks()))

    async def garbage(request: Request) -> Response:
        return JSONResponse({"collected": gc.isenabled(), "frozen": gc.get_freeze_count()})

    def loaded() -> None:
        port = listener.getsockname()[1]
        print(f"address http://127.0.0.1:{port}", file=sys.stderr, flush=True)

    lifecycle = Lifecycle(engine, settings.drain_seconds, on_loaded=loaded)
    extra = [
        Route("/test/fail", fail_next_step, methods=["POST"]),
        Route("/test/raise", raise_error),
        Route("/test/tasks", tasks),
        Route("/test/garbage", garbage),
    ]

    def with_extra(*arguments: Any) -> Starlette:
        app = create_app(*arguments)
        app.router.routes += extra
        return app

    serving.create_app = with_extra
    with listen(settings) as listener:
        serving.run(lifecycle, settings, listener, logs, tracing, None, batches)


if __name__ == "__main__":
    main()
