"""The Responses API over WebSocket, by OpenAI's own client and by hand."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import openai
import pytest
from websockets.asyncio.client import connect

from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess
from tests.server.talk import (
    HELLO,
    LAST,
    V1,
    chat,
    create,
    numbers,
    receive,
    said,
    send,
    session,
    text_of,
    until_end,
)


@pytest.mark.filterwarnings("ignore:connect\\(\\) must be used:DeprecationWarning")
async def test_openais_client_connects_unmodified(mock: ServerProcess) -> None:
    client = openai.AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="x")
    async with client.responses.connect() as connection:
        await connection.response.create(model="mock", input="hi", max_output_tokens=6)
        text, identifier = "", ""
        async for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type == "response.incomplete":
                identifier = event.response.id
                break
        assert text == HELLO[:6]
        await connection.response.create(
            model="mock", input="more", previous_response_id=identifier, max_output_tokens=4
        )
        async for event in connection:
            if event.type == "response.incomplete":
                break
        prompt = chat(("user", "hi"), ("assistant", text), ("user", "more"))
        assert event.response.output_text == text_of(prompt, 4)
    with openai.OpenAI(base_url=f"{mock.url}/v1", api_key="x").responses.connect() as plain:
        plain.response.create(model="mock", input="hi", max_output_tokens=3)
        kinds = []
        for event in plain:
            kinds.append(event.type)
            if event.type == "response.incomplete":
                break
        assert kinds[0] == "response.created"
    await client.close()


async def test_lanes_run_at_once_and_each_in_order(mock: ServerProcess) -> None:
    async with session(mock) as socket:
        await create(socket, stream_id="a", max_output_tokens=120)
        await create(socket, stream_id="a", input="second")
        await create(socket, stream_id="b")
        events = await until_end(socket, 3)
    ends = [(e["stream_id"], e["type"]) for e in events if e["type"] in LAST]
    assert [lane for lane, _ in ends] == ["b", "a", "a"]
    a = [e for e in events if e["stream_id"] == "a"]
    second = next(n for n, e in enumerate(a) if n and e["type"] == "response.created")
    assert numbers(a[:second]) == list(range(second))
    assert numbers(a[second:]) == list(range(len(a) - second))
    assert said(a[:second]) == HELLO[:120]
    assert said(a[second:]) == text_of(chat(("user", "second")), 6)


async def test_without_store_the_connection_still_remembers(mock: ServerProcess) -> None:
    async with session(mock) as socket:
        await create(socket, store=False)
        identifier = (await until_end(socket))[-1]["response"]["id"]
        await create(socket, input="more", previous_response_id=identifier)
        events = await until_end(socket)
        prompt = chat(("user", "hi"), ("assistant", HELLO[:6]), ("user", "more"))
        assert said(events) == text_of(prompt, 6)
    async with session(mock) as socket:
        await create(socket, previous_response_id=identifier)
        (error,) = await until_end(socket)
    assert error["status"] == 404
    assert error["error"]["code"] == "previous_response_not_found"


async def test_state_can_be_prepared_without_output(mock: ServerProcess) -> None:
    async with session(mock) as socket:
        await create(socket, generate=False)
        events = await until_end(socket)
        response = events[-1]["response"]
        assert (response["status"], response["output"]) == ("completed", [])
        await create(socket, input="now", previous_response_id=response["id"])
        prompt = chat(("user", "hi"), ("user", "now"))
        assert said(await until_end(socket)) == text_of(prompt, 6)


async def test_a_steered_response_ends_and_its_successor_goes_on(mock: ServerProcess) -> None:
    async with session(mock) as socket:
        await create(socket, stream_id="s", max_output_tokens=200)
        events = [await receive(socket)]
        identifier = events[0]["response"]["id"]
        while events[-1]["type"] != "response.output_text.delta":
            events.append(await receive(socket))
        await send(socket, "response.steer", previous_response_id=identifier, input="shorter")
        events += await until_end(socket)
        assert numbers(events) == list(range(len(events)))
        assert "response.steer.accepted" in [e["type"] for e in events]
        last = events[-1]
        assert last["response"]["incomplete_details"] == {"reason": "steered"}
        text = said(events)
        created = await receive(socket)
        assert created["type"] == "response.created"
        assert created["stream_id"] == "s"
        assert created["response"]["previous_response_id"] == identifier
        first = await receive(socket)
        while first["type"] != "response.output_text.delta":
            first = await receive(socket)
        prompt = chat(("user", "hi"), ("assistant", text), ("user", "shorter"))
        assert text_of(prompt, 100).startswith(first["delta"])
        await send(socket, "response.steer", previous_response_id=identifier, input="late")
        event = await receive(socket)
        while event["type"] != "response.steer.failed":
            event = await receive(socket)
        assert event["error"]["code"] == "response_not_found"
        assert event["steer"]["input"] == "late"


async def test_a_drop_without_the_subprotocol_aborts(mock: ServerProcess) -> None:
    async with session(mock) as socket:
        await create(socket, max_output_tokens=380)
        await receive(socket)
    assert mock.idle(2)


async def test_a_drop_with_it_is_resumed_at_every_event(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        await create(socket)
        whole = len(await until_end(socket))
    for cut in range(whole - 1):
        async with session(mock, V1) as socket:
            await create(socket, stream_id="x")
            seen = [await receive(socket) for _ in range(cut + 1)]
            socket.transport.abort()
        if seen[-1]["type"] == "response.completed":
            continue  # deltas joined, so that this answer had fewer events
        created = next(e for e in seen if e["type"] == "response.created")
        async with session(mock, V1) as socket:
            await send(
                socket,
                "response.resume",
                response_id=created["response"]["id"],
                starting_after=seen[-1]["sequence_number"],
            )
            events = [*seen, *await until_end(socket)]
        assert numbers(events) == list(range(len(events)))
        assert said(events) == HELLO[:6]
        assert {e["stream_id"] for e in events} == {"x"}


async def test_a_chat_completion_comes_as_events(mock: ServerProcess) -> None:
    request = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "n": 2}
    async with session(mock, V1) as socket:
        await send(socket, "chat.completion.create", stream_id="c", request=request)
        events = await until_end(socket)
    assert numbers(events) == list(range(len(events)))
    chunks = [e["chunk"] for e in events if e["type"] == "chat.completion.chunk"]
    for index in range(2):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in choices) == HELLO[:6]
    assert events[-1]["response"]["usage"]["completion_tokens"] == 12


async def test_cancel_says_what_it_took_and_can_be_repeated(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        await create(socket, max_output_tokens=380)
        events = [await receive(socket)]
        identifier = events[0]["response"]["id"]
        while len(said(events)) < 3:
            events.append(await receive(socket))
        for _ in range(3):
            await send(socket, "response.cancel", response_id=identifier)
        events += await until_end(socket)
        last = events[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert last["response"]["usage"]["output_tokens"] == len(said(events)) < 380
        await send(socket, "response.cancel", response_id="resp_nothing")
        assert (await receive(socket))["error"]["code"] == "response_not_found"


async def test_a_paused_response_holds_nothing_until_it_goes_on(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        await create(socket, max_output_tokens=150)
        events = [await receive(socket)]
        identifier = events[0]["response"]["id"]
        await send(socket, "response.pause", response_id=identifier)
        with anyio.move_on_after(1.0):
            while True:
                events.append(json.loads(await socket.recv()))
        assert events[-1]["type"] not in LAST
        assert mock.metric("ryzanstein_kv_pages_used") == 0
        await send(socket, "response.continue", response_id=identifier)
        events += await until_end(socket)
    assert said(events) == HELLO[:150]
    assert numbers(events) == list(range(len(events)))


async def test_without_credit_deltas_join_and_nothing_is_lost(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        await send(socket, "flow.credit", stream_id="f", events=3)
        await create(socket, stream_id="f", max_output_tokens=300)
        events = [await receive(socket) for _ in range(3)]
        with anyio.move_on_after(1.0):
            events.append(json.loads(await socket.recv()))
        assert len(events) == 3
        assert mock.metric("ryzanstein_kv_pages_used") == 0, "it was set aside"
        await send(socket, "flow.credit", stream_id="f", events=10_000)
        events += await until_end(socket)
    assert said(events) == HELLO[:300]
    assert numbers(events) == list(range(len(events)))
    longest = max(len(e.get("delta", "")) for e in events)
    assert longest >= 64


async def test_who_reads_too_slowly_gets_an_error(mock_server: MockFactory) -> None:
    server = mock_server({"slow_consumer_seconds": 0.3}, pages=128, context=250)
    async with session(server, V1) as socket:
        await send(socket, "flow.credit", stream_id="f", events=2)
        await create(socket, stream_id="f", max_output_tokens=200)
        await anyio.sleep(1.0)
        await send(socket, "flow.credit", stream_id="f", events=10_000)
        events = await until_end(socket)
    assert events[-1]["type"] == "response.failed"
    assert "read faster" in events[-1]["response"]["error"]["message"]
    assert HELLO.startswith(said(events))


async def test_those_who_wait_are_told_where_they_stand(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.03, max_running=1)
    async with session(server, V1) as socket:
        for lane in "abc":
            await create(socket, stream_id=lane, max_output_tokens=20)
        events = await until_end(socket, 3)
    told = [e for e in events if e["type"] == "response.queued.progress"]
    assert {e["stream_id"] for e in told} >= {"b", "c"}
    assert {e["position"] for e in told} >= {0, 1}
    assert all(e["eta_ms"] >= 0 and e["reason"] for e in told)
    for lane in "abc":
        mine = [e for e in events if e["stream_id"] == lane]
        assert numbers(mine) == list(range(len(mine)))


async def test_only_the_same_key_comes_back(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["one", "two"]}, delay=0.01)
    url = f"ws://127.0.0.1:{server.port}/v1/responses"
    options: dict[str, Any] = {"subprotocols": [V1]}
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with connect(url, additional_headers=one, **options) as socket:
        await receive(socket)
        await create(socket, max_output_tokens=30)
        event = await receive(socket)
        while event["type"] != "response.created":
            event = await receive(socket)
        identifier = event["response"]["id"]
    async with connect(url, additional_headers=two, **options) as socket:
        await receive(socket)
        await send(socket, "response.resume", response_id=identifier)
        assert (await receive(socket))["status"] == 404
    async with connect(url, additional_headers=one, **options) as socket:
        await receive(socket)
        await send(socket, "response.resume", response_id=identifier)
        assert said(await until_end(socket)) == HELLO[:30]
    async with httpx.AsyncClient(base_url=server.url) as http:
        path = f"/v1/responses/{identifier}"
        assert (await http.get(path, headers=two)).status_code == 404
        assert (await http.get(path, headers=one)).status_code == 200


async def test_credit_is_what_is_sent_also_of_several_readers(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        identifiers = []
        for _ in range(2):
            await create(socket, max_output_tokens=20)
            identifiers.append((await until_end(socket))[-1]["response"]["id"])
        await send(socket, "flow.credit", stream_id="r", events=5)
        for identifier in identifiers:
            await send(socket, "response.resume", response_id=identifier, stream_id="r")
        events = [await receive(socket) for _ in range(5)]
        with anyio.move_on_after(0.5):
            events.append(json.loads(await socket.recv()))
        assert len(events) == 5
        await send(socket, "flow.credit", stream_id="r", events=1000)
        events += await until_end(socket, 2)
    assert len(said(events)) == 40


async def test_a_reader_that_waits_takes_no_credit(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        await create(socket, stream_id="p", max_output_tokens=300)
        created = await receive(socket)
        identifier = created["response"]["id"]
        await send(socket, "response.pause", response_id=identifier)
        await anyio.sleep(0.3)
        await send(socket, "flow.credit", stream_id="w", events=4)
        known = {"response_id": identifier, "stream_id": "w"}
        await send(socket, "response.resume", **known, starting_after=created["sequence_number"])
        await create(socket, stream_id="w")
        seen = 0
        while seen < 4:
            seen += (await receive(socket))["stream_id"] == "w"
        await send(socket, "response.cancel", response_id=identifier)
        await send(socket, "flow.credit", stream_id="w", events=1000)
        while (await receive(socket))["type"] not in LAST:
            pass


async def test_a_cancel_beats_a_steer(mock: ServerProcess) -> None:
    async with session(mock, V1) as socket:
        await create(socket, max_output_tokens=380)
        events = [await receive(socket)]
        while events[-1]["type"] != "response.output_text.delta":
            events.append(await receive(socket))
        created = next(e for e in events if e["type"] == "response.created")
        identifier = created["response"]["id"]
        await send(socket, "response.cancel", response_id=identifier)
        await send(socket, "response.steer", previous_response_id=identifier, input="x")
        kinds = set()
        while not {"response.incomplete", "response.steer.failed"} <= kinds:
            event = await receive(socket)
            kinds.add(event["type"])
            if event["type"] == "response.incomplete":
                assert event["response"]["status"] == "cancelled"
        await create(socket, input="again")
        first = await receive(socket)
        while first["type"] != "response.created":
            first = await receive(socket)
        assert first["response"]["previous_response_id"] is None


async def test_a_chat_completion_is_nothing_to_go_on_from(mock: ServerProcess) -> None:
    request = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with session(mock, V1) as socket:
        await send(socket, "chat.completion.create", request=request)
        identifier = (await until_end(socket))[-1]["response"]["id"]
        await create(socket, previous_response_id=identifier)
        (error,) = await until_end(socket)
    assert error["error"]["code"] == "previous_response_not_found"
