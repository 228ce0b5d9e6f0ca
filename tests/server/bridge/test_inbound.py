"""The model as a server of the Model Context Protocol, by its own client, in both eras."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

Era = Literal["legacy", "auto"]
eras = pytest.mark.parametrize("era", ["legacy", "auto"])


@asynccontextmanager
async def connected(server: ServerProcess, era: Era = "auto") -> AsyncIterator[Client]:
    with anyio.fail_after(30):
        async with Client(f"{server.url}/mcp", mode=era) as client:
            yield client


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


@eras
async def test_its_tools_are_listed_with_their_arguments(roomy: ServerProcess, era: Era) -> None:
    async with connected(roomy, era) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"generate", "chat", "tokenize", "list_models", "cancel"}
    schema = tools["generate"].input_schema
    assert schema["type"] == "object"
    assert schema["required"] == ["prompt"]
    assert tools["chat"].description.startswith("Answer a conversation")


@eras
async def test_generated_text_comes_as_progress_and_whole(roomy: ServerProcess, era: Era) -> None:
    told: list[str] = []
    made: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append(message or "")
        made.append(done)

    async with connected(roomy, era) as client:
        result = await client.call_tool(
            "generate", {"prompt": "hello", "max_tokens": 12}, progress_callback=progress
        )
    assert not result.is_error
    assert result.content[0].text == text_of("hello", 12)
    assert result.structured_content["finish_reason"] == "length"
    assert result.structured_content["completion_tokens"] == 12
    assert "".join(told) == text_of("hello", 12)
    assert made == sorted(made)


@eras
async def test_a_chat_under_a_schema(roomy: ServerProcess, era: Era) -> None:
    schema = {"enum": ["yes", "no"]}
    arguments = {"messages": [{"role": "user", "content": "well?"}], "json_schema": schema}
    async with connected(roomy, era) as client:
        result = await client.call_tool("chat", arguments)
    assert json.loads(result.content[0].text) in ("yes", "no")


async def test_the_small_tools(roomy: ServerProcess) -> None:
    async with connected(roomy) as client:
        tokens = await client.call_tool("tokenize", {"text": "ab"})
        models = await client.call_tool("list_models", {})
    assert tokens.structured_content == {"count": 2, "tokens": [97, 98]}
    assert models.structured_content == {"models": ["mock"]}


@pytest.mark.parametrize(
    ("tool", "arguments", "complaint"),
    [
        ("generate", {}, "prompt"),
        ("generate", {"prompt": 3}, "prompt"),
        ("generate", {"prompt": "x", "temperature": 9}, "temperature"),
        ("generate", {"prompt": "x", "colour": "red"}, "colour"),
        ("generate", {"prompt": "x", "json_schema": {"type": "strin"}}, "strin"),
        ("generate", {"prompt": "x" * 9000}, "context"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [{"role": "king", "content": "x"}]}, "role"),
        ("cancel", {"request_id": "nobody"}, "nobody"),
        ("cancel", {"request_id": "not a name"}, "request_id"),
    ],
    ids=str,
)
async def test_what_is_wrong_with_a_call_is_told_in_its_result(
    roomy: ServerProcess, tool: str, arguments: dict[str, Any], complaint: str
) -> None:
    async with connected(roomy) as client:
        result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert complaint in result.content[0].text


async def test_a_tool_or_resource_that_is_not_there(roomy: ServerProcess) -> None:
    async with connected(roomy) as client:
        with pytest.raises(MCPError, match="there is no tool 'dance'"):
            await client.call_tool("dance", {})
        with pytest.raises(MCPError, match="there is no resource"):
            await client.read_resource("ryzanstein://nothing")
        with pytest.raises(MCPError, match="nothing is known of an answer"):
            await client.read_resource("ryzanstein://requests/none/timeline")


async def test_metrics_and_a_timeline_are_resources(roomy: ServerProcess) -> None:
    async with connected(roomy) as client:
        (metrics,) = (await client.list_resources()).resources
        text = (await client.read_resource(metrics.uri)).contents[0].text
        assert re.search(r"^ryzanstein_requests_running 0", text, re.MULTILINE)
        result = await client.call_tool("generate", {"prompt": "hello", "max_tokens": 3})
        (template,) = (await client.list_resource_templates()).resource_templates
        uri = template.uri_template.replace("{id}", result.structured_content["request_id"])
        shown = json.loads((await client.read_resource(uri)).contents[0].text)
    assert shown["object"] == "timeline"


async def test_a_request_is_cancelled_by_its_name(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01, pages=512, context=2000)
    results = {}
    async with connected(server) as client, connected(server) as other:

        async def generate() -> None:
            results["it"] = await client.call_tool(
                "generate", {"prompt": "x", "max_tokens": 1500, "request_id": "mine"}
            )

        async with anyio.create_task_group() as group:
            group.start_soon(generate)
            cancelled = None
            while cancelled is None or cancelled.is_error:
                cancelled = await other.call_tool("cancel", {"request_id": "mine"})
                await anyio.sleep(0.02)
    assert results["it"].structured_content["finish_reason"] == "abort"
    assert server.idle(2)


async def test_whoever_leaves_ends_its_request(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01, pages=512, context=2000)
    with anyio.move_on_after(1.0):
        async with Client(f"{server.url}/mcp") as client:
            await client.call_tool("generate", {"prompt": "x", "max_tokens": 1500})
    assert server.idle(2)


@asynccontextmanager
async def with_key(server: ServerProcess, key: str) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(headers={"authorization": f"Bearer {key}"}) as http:
        transport = streamable_http_client(f"{server.url}/mcp", http_client=http)
        async with Client(transport) as client:
            yield client


async def test_keys_keep_requests_apart(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["one", "two"]}, delay=0.01, pages=512, context=2000)
    async with (
        with_key(server, "one") as first,
        with_key(server, "two") as second,
        anyio.create_task_group() as group,
    ):
        arguments = {"prompt": "x", "max_tokens": 100, "request_id": "mine"}
        group.start_soon(first.call_tool, "generate", arguments)
        await anyio.sleep(0.3)
        refused = await second.call_tool("cancel", {"request_id": "mine"})
        assert refused.is_error


def test_keys_are_asked_for(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["one"]})
    assert httpx.post(f"{server.url}/mcp", json={}).status_code == 401


def test_a_page_from_elsewhere_is_kept_out(roomy: ServerProcess) -> None:
    headers = {"origin": "https://evil.example", "accept": "application/json, text/event-stream"}
    response = httpx.post(f"{roomy.url}/mcp", json={}, headers=headers)
    assert response.status_code == 403
