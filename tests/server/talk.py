"""A WebSocket session of responses, as its tests hold it with the mock server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from websockets.asyncio.client import ClientConnection, connect

from tests.mock import continuation
from tests.server.process import ServerProcess

V1 = "ryzanstein.v1"
LAST = ("response.completed", "response.incomplete", "response.failed", "error")


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<{role}>{text}\n" for role, text in turns) + "<assistant>"


HELLO = text_of(chat(("user", "hi")), 400)


@asynccontextmanager
async def session(server: ServerProcess, *protocols: str) -> AsyncIterator[ClientConnection]:
    url = f"ws://127.0.0.1:{server.port}/v1/responses"
    async with connect(url, subprotocols=list(protocols) or None) as socket:  # type: ignore[arg-type]
        if protocols:
            assert json.loads(await socket.recv())["type"] == "session.created"
        yield socket


async def send(socket: ClientConnection, kind: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": kind, **fields}))


async def create(socket: ClientConnection, **fields: Any) -> None:
    given = {"model": "mock", "input": "hi", "max_output_tokens": 6} | fields
    await send(socket, "response.create", **given)


async def receive(socket: ClientConnection) -> dict[str, Any]:
    with anyio.fail_after(10):
        event: dict[str, Any] = json.loads(await socket.recv())
        return event


async def until_end(socket: ClientConnection, count: int = 1) -> list[dict[str, Any]]:
    """Events up to the `count`-th that ends a response, or fails."""
    events = []
    while count:
        events.append(await receive(socket))
        count -= events[-1]["type"] in LAST
    return events


def said(events: list[dict[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["sequence_number"] for event in events]
