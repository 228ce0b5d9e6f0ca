"""The plain WebSocket, `/v1/stream`, with the `websockets` client."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


def address(server: ServerProcess) -> str:
    return server.url.replace("http", "ws") + "/v1/stream"


async def receive(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(await socket.recv())  # type: ignore[no-any-return]


async def answer(socket: ClientConnection) -> list[dict[str, Any]]:
    """Events up to `done` or `error`."""
    events = [await receive(socket)]
    while events[-1]["type"] not in ("done", "error"):
        events.append(await receive(socket))
    return events


def text(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(e["text"] for e in events if e["type"] == "delta" and e["index"] == index)


async def test_chat_and_completion_bodies_on_one_connection(mock: ServerProcess) -> None:
    async with connect(address(mock)) as socket:
        await socket.send(json.dumps(CHAT))
        events = await answer(socket)
        assert events[0]["type"] == "start"
        assert text(events) == text_of("<user>hi\n<assistant>", 8)
        assert events[-2] == {"type": "finish", "index": 0, "reason": "length"}
        assert events[-1]["usage"] == {"prompt_tokens": 20, "completion_tokens": 8}
        await socket.send(json.dumps({"prompt": ["ab", "cd"], "max_tokens": 3, "model": "mock"}))
        events = await answer(socket)
        assert [text(events, i) for i in (0, 1)] == [text_of("ab", 3), text_of("cd", 3)]


async def test_requests_sent_together_are_answered_in_turn(mock: ServerProcess) -> None:
    async with connect(address(mock)) as socket:
        for prompt in ("one", "two"):
            await socket.send(json.dumps({"prompt": prompt, "max_tokens": 4}))
        assert text(await answer(socket)) == text_of("one", 4)
        assert text(await answer(socket)) == text_of("two", 4)


async def test_cancel_stops_the_running_request_and_the_next_is_served(
    mock_server: MockFactory,
) -> None:
    server = mock_server(delay=0.01)
    async with connect(address(server)) as socket:
        await socket.send(json.dumps({"type": "cancel"}))  # nothing runs: nothing happens
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 150}))
        while (await receive(socket))["type"] != "delta":
            pass
        await socket.send(json.dumps({"type": "cancel"}))
        events = await answer(socket)
        assert events[-2] == {"type": "finish", "index": 0, "reason": "cancelled"}
        assert 1 <= events[-1]["usage"]["completion_tokens"] < 30
        assert server.idle(2)
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 2}))
        assert text(await answer(socket)) == text_of("ab", 2)


async def test_leaving_aborts(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01)
    async with connect(address(server)) as socket:
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 150}))
        await receive(socket)
    assert server.idle(2)
    assert server.metric('ryzanstein_requests_finished_total{reason="abort"}') == 1


async def test_leaving_right_after_sending_aborts_too(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01)
    for _ in range(5):
        async with connect(address(server)) as socket:
            await socket.send(json.dumps({"prompt": "ab", "max_tokens": 150}))
            socket.transport.abort()
    assert server.idle(1)


async def test_an_early_cancel_ends_what_was_sent_before_it(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01)
    async with connect(address(server)) as socket:
        for _ in range(2):
            await socket.send(json.dumps({"prompt": "ab", "max_tokens": 150}))
        await socket.send(json.dumps({"type": "cancel"}))
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 2}))
        for _ in range(2):
            events = await answer(socket)
            assert events[-2]["reason"] == "cancelled"
        assert text(await answer(socket)) == text_of("ab", 2)


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("nonsense", "invalid_json", None),
        ("[" * 50_000, "invalid_type", None),
        ("[1]", "invalid_type", None),
        ('{"prompt": 5}', None, "prompt"),
        ('{"messages": []}', None, "messages"),
        ('{"messages": [{"role": "user", "content": 1}]}', "invalid_type", "messages.[0].content"),
        ('{"prompt": "a", "temperature": 9}', None, "temperature"),
        ('{"prompt": "a", "model": "other"}', "model_not_found", "model"),
        ('{"type": "dance"}', None, "prompt"),
        ('{"prompt": "a", "echo": true}', None, "echo"),
        ('{"prompt": "a", "logprobs": 1}', None, "logprobs"),
    ],
)
async def test_bad_messages_get_one_error_and_the_connection_stays(
    mock: ServerProcess, message: str, code: str | None, param: str | None
) -> None:
    async with connect(address(mock)) as socket:
        await socket.send(message)
        (event,) = await answer(socket)
        assert (event["type"], event["error"]["code"], event["error"]["param"]) == (
            "error",
            code,
            param,
        )
        assert 400 <= event["status"] < 500
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 2}))
        assert text(await answer(socket)) == text_of("ab", 2)


async def test_binary_messages_and_full_queues_are_refused(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.02)
    async with connect(address(server)) as socket:
        await socket.send(b"\x00")
        (event,) = await answer(socket)
        assert "binary" in event["error"]["message"]
        for _ in range(12):
            await socket.send(json.dumps({"prompt": "ab", "max_tokens": 100}))
        while (event := await receive(socket))["type"] != "error":
            pass
        assert (event["status"], event["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_a_failed_step_is_told_and_the_connection_stays(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01)
    async with connect(address(server)) as socket:
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 150}))
        await receive(socket)
        await anyio.to_thread.run_sync(httpx.post, f"{server.url}/test/fail")
        events = await answer(socket)
        assert (events[-1]["status"], events[-1]["error"]["code"]) == (503, "engine_unavailable")
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 2}))
        assert text(await answer(socket)) == text_of("ab", 2)


async def test_handshakes_are_guarded(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["secret"]})
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer secret", "Origin": "https://evil.example"}, 403),
    ):
        with pytest.raises(InvalidStatus) as error:
            async with connect(address(server), additional_headers=headers):
                pass
        assert error.value.response.status_code == status
    fine = {"Authorization": "Bearer secret", "Origin": server.url}
    async with connect(address(server), additional_headers=fine) as socket:
        await socket.send(json.dumps({"prompt": "ab", "max_tokens": 1}))
        assert text(await answer(socket)) == text_of("ab", 1)
