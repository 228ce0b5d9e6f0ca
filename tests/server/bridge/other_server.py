"""A server of the Model Context Protocol for tests: useful, and hostile in every way."""

from __future__ import annotations

import os
import sys
from typing import Literal

import anyio
import anyio.lowlevel
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

server = MCPServer("other")


@server.tool()
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


@server.tool()
async def hang() -> str:
    """Never answers."""
    await anyio.sleep(3600)
    return ""


@server.tool()
def fail() -> str:
    """Fails."""
    raise ToolError("it broke")


@server.tool()
def long() -> str:
    """Answers with more than anybody reads."""
    return "x" * 200_000


@server.tool()
def huge() -> str:
    """Answers with more than is taken."""
    return "x" * (8 << 20)


@server.tool(name="a/b")
def unnameable() -> str:
    """Has a name that no model can be given."""
    return ""


@server.tool()
def die() -> str:
    """Ends its process."""
    os._exit(1)


async def flood(request: Request) -> Response:
    """Events without an end, which are no answer."""

    async def chunks():  # type: ignore[no-untyped-def]
        while True:
            yield b": " + b"x" * 65_536 + b"\n\n"
            await anyio.lowlevel.checkpoint()  # or whoever leaves would not be noticed

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def lie(request: Request) -> Response:
    """Promises more than it sends."""
    return Response(b"{}", headers={"content-length": "1000000"}, media_type="application/json")


async def nonsense(request: Request) -> Response:
    return Response(b"\xff not JSON", media_type="application/json")


async def redirect(request: Request) -> Response:
    return Response(status_code=307, headers={"location": "http://127.0.0.1:9/mcp"})


def main(port: int) -> None:
    inner = server.streamable_http_app()
    routes = [
        Route("/flood", flood, methods=["POST"]),
        Route("/lie", lie, methods=["POST"]),
        Route("/nonsense", nonsense, methods=["POST"]),
        Route("/redirect", redirect, methods=["POST"]),
        Mount("/", inner),
    ]
    app = Starlette(routes=routes, lifespan=lambda _: inner.router.lifespan_context(inner))
    uvicorn.run(app, port=port, log_level="error")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(int(sys.argv[1]))
    else:
        server.run("stdio")
