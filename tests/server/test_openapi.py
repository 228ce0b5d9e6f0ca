"""The server's own description of what it takes."""

from __future__ import annotations

import httpx

from server.app import create_app
from server.protocol import ChatRequest
from tests.server.process import ServerProcess


def test_it_describes_every_route_and_every_field(mock: ServerProcess) -> None:
    document = httpx.get(f"{mock.url}/openapi.json").json()
    described = {
        (method.upper(), path) for path, ops in document["paths"].items() for method in ops
    }
    source = create_app.__code__.co_consts
    routes = {c for c in source if isinstance(c, str) and c.startswith("/") and "{" not in c}
    assert routes - {path for _, path in described} == {
        "/",
        "/mcp",
        "/openapi.json",
        "/v1/console",
        "/v1/stream",
    }
    assert ("DELETE", "/v1/responses/{id}") in described
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(chat) == set(ChatRequest.__struct_fields__)
    assert chat["functions"] == {"enum": [None, []], "default": None}
    assert document["openapi"].startswith("3.1")
