"""What a WebSocket session of responses refuses, and how it ends."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess
from tests.server.talk import HELLO, V1, create, receive, said, send, session, until_end


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("{", None),
        ("[]", None),
        ('"x"', None),
        ("[" * 60_000, None),
        ("{}", "type"),
        ('{"type": 5}', "type"),
        ('{"type": "response.dance"}', "type"),
        ('{"type": "response.create", "input": 5}', "input"),
        ('{"type": "response.create", "input": "hi", "background": true}', "background"),
        ('{"type": "response.create", "input": "hi", "stream_id": 5}', "stream_id"),
        ('{"type": "response.create", "input": "hi", "stream_id": ""}', "stream_id"),
        ('{"type": "response.create", "input": "hi", "tools": [{}]}', "tools.[0].type"),
        ('{"type": "response.create", "input": "hi", "model": "other"}', "model"),
        ('{"type": "chat.completion.create"}', "request"),
        ('{"type": "chat.completion.create", "request": 5}', None),
        ('{"type": "response.cancel"}', "response_id"),
        ('{"type": "response.resume", "response_id": 5}', "response_id"),
        ('{"type": "flow.credit", "events": 0}', "events"),
        ('{"type": "flow.credit", "events": "x"}', "events"),
    ],
    ids=range(19),
)
async def test_a_wrong_message_is_one_error_and_the_connection_stays(
    mock: ServerProcess, message: str, param: str | None
) -> None:
    async with session(mock, V1) as socket:
        await socket.send(message)
        error = await receive(socket)
        assert error["type"] == "error"
        assert 400 <= error["status"] < 500
        assert error["error"]["param"] == param
        await create(socket)
        assert said(await until_end(socket)) == HELLO[:6]


async def test_extensions_take_the_subprotocol(mock: ServerProcess) -> None:
    async with session(mock) as socket:
        await send(socket, "response.cancel", response_id="x")
        assert V1 in (await receive(socket))["error"]["message"]
        await socket.send(b"\x00")
        assert (await receive(socket))["status"] == 400


async def test_too_many_lanes_are_refused_with_a_time_to_come_back(
    mock_server: MockFactory,
) -> None:
    server = mock_server({"max_streams": 2}, delay=0.02)
    async with session(server, V1) as socket:
        for lane in "abc":
            await create(socket, stream_id=lane)
        events = await until_end(socket, 3)
    (error,) = (e for e in events if e["type"] == "error")
    assert (error["status"], error["stream_id"]) == (429, "c")
    assert error["error"]["headers"]["retry-after"] == "1"


async def test_a_key_that_goes_ends_the_connection(
    mock_server: MockFactory, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.a]\nkeys = ["one", "other"]\n')
    server = mock_server({"tenants_file": str(file)})
    url = f"ws://127.0.0.1:{server.port}/v1/responses"
    headers = {"authorization": "Bearer one"}
    async with connect(url, additional_headers=headers) as socket:
        await create(socket)
        assert said(await until_end(socket)) == HELLO[:6]
        file.write_text('[tenants.a]\nkeys = ["other"]\n')
        await anyio.sleep(1.5)
        await create(socket)
        with pytest.raises(ConnectionClosed) as caught:
            await until_end(socket)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008


async def test_who_cannot_be_served_is_told_to_come_back(mock_server: MockFactory) -> None:
    server = mock_server({"drain_seconds": 5.0}, delay=0.05)
    async with session(server, V1) as socket:
        await create(socket, max_output_tokens=40)
        await receive(socket)
        server.terminate()
        await anyio.sleep(0.3)
        url = f"ws://127.0.0.1:{server.port}/v1/responses"
        async with connect(url) as late:
            assert (await receive(late))["status"] == 503
            with pytest.raises(ConnectionClosed) as caught:
                await late.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1013
        assert (await until_end(socket))[-1]["type"] == "response.incomplete"


async def test_connections_end_with_a_code_that_says_why(mock_server: MockFactory) -> None:
    server = mock_server({"max_body_bytes": 1000, "drain_seconds": 0.2}, delay=0.05)
    async with session(server, V1) as socket:
        await create(socket, input="x" * 2000)
        with pytest.raises(ConnectionClosed) as caught:
            await until_end(socket)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009
    async with session(server, V1) as socket:
        server.terminate()
        with pytest.raises(ConnectionClosed) as caught:
            await until_end(socket)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code in (1001, 1012)
