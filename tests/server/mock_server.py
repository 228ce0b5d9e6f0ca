"""A server around the model without weights, for what has to be exact: text, timing, failures.

Settings come from the environment, so that a test can start it as a process of its own.
"""

from __future__ import annotations

import json
import os
import sys

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.config import ServerSection
from server.app import Lifecycle, create_app
from server.serving import DrainingServer, _bound_port, _uvicorn_config
from tests.mock import mock_engine


def main() -> None:
    options = json.loads(os.environ.get("MOCK_ENGINE", "{}"))
    delay = options.pop("delay", 0.0)
    settings = ServerSection(port=0, **json.loads(os.environ.get("MOCK_SERVER", "{}")))
    engine, executor = mock_engine(**options)
    executor.delay = delay

    async def fail_next_step(request: Request) -> Response:
        executor.error = RuntimeError("device lost")
        return JSONResponse({})

    async def raise_error(request: Request) -> Response:
        raise ZeroDivisionError("a secret detail")

    def loaded() -> None:
        port = _bound_port(server)
        print(f"address http://127.0.0.1:{port}", file=sys.stderr, flush=True)

    def stopped() -> None:
        server.should_exit = True

    lifecycle = Lifecycle(engine, settings.drain_seconds, on_loaded=loaded, on_stop=stopped)
    config = _uvicorn_config(lifecycle, settings)
    app = create_app(lifecycle, settings)
    app.router.routes.append(Route("/test/fail", fail_next_step, methods=["POST"]))
    app.router.routes.append(Route("/test/raise", raise_error))
    config.app = app
    server = DrainingServer(config, lifecycle.stop)
    server.run()


if __name__ == "__main__":
    main()
