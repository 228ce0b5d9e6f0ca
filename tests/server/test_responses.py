"""The Responses API over HTTP, by OpenAI's own client and by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<{role}>{text}\n" for role, text in turns) + "<assistant>"


@pytest.fixture(scope="module")
def client(mock: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mock.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(mock: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=mock.url, timeout=20) as client:
        yield client


def body(**more: Any) -> dict[str, Any]:
    return {"model": "mock", "input": "hi", "max_output_tokens": 6} | more


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; names and ids beside them have to agree."""
    events = []
    for block in text.split("\n\n")[:-1]:
        name, number, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert number == f"id: {event['sequence_number']}"
        events.append(event)
    return events


def test_an_answer(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="mock",
        input="hi",
        instructions="be brief",
        max_output_tokens=8,
        metadata={"a": "b"},
    )
    prompt = chat(("system", "be brief"), ("user", "hi"))
    assert response.output_text == text_of(prompt, 8)
    assert (response.status, response.object) == ("incomplete", "response")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(prompt), 8)
    assert response.metadata == {"a": "b"}
    again = client.responses.retrieve(response.id)
    assert again == response


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(model="mock", input="hi", max_output_tokens=8, stream=True)
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == text_of(chat(("user", "hi")), 8)
    assert events[-1].response.output_text == text  # type: ignore[union-attr]
    stop = {"stop": text[4]}
    with client.responses.stream(model="mock", input="hi", extra_body=stop) as stream:
        assert stream.get_final_response().output_text == text[: text.index(text[4])]


def test_a_conversation_goes_on_from_a_response(client: openai.OpenAI) -> None:
    first = client.responses.create(model="mock", input="hi", max_output_tokens=4)
    second = client.responses.create(
        model="mock",
        previous_response_id=first.id,
        max_output_tokens=4,
        input=[
            {"role": "developer", "content": "now"},
            {"role": "user", "content": [{"type": "input_text", "text": "more"}]},
        ],
    )
    prompt = chat(
        ("user", "hi"), ("assistant", first.output_text), ("system", "now"), ("user", "more")
    )
    assert second.output_text == text_of(prompt, 4)
    items = client.responses.input_items.list(second.id, order="asc", limit=1)
    assert [item.content[0].text for item in items] == ["now", "more"]  # type: ignore[union-attr]
    count = client.responses.input_tokens.count(
        model="mock", input="again", previous_response_id=second.id
    )
    longer = prompt + second.output_text + "\n<user>again\n<assistant>"
    assert count.input_tokens == len(longer)


def test_what_is_deleted_or_not_stored_is_gone(client: openai.OpenAI) -> None:
    kept = client.responses.create(model="mock", input="hi", max_output_tokens=2)
    client.responses.delete(kept.id)
    unkept = client.responses.create(model="mock", input="hi", max_output_tokens=2, store=False)
    for identifier in (kept.id, unkept.id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(identifier)
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model="mock", input="x", previous_response_id=identifier)
        assert caught.value.code == "previous_response_not_found"


def test_a_response_in_the_background(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="mock", input="hi", max_output_tokens=20, background=True
    )
    assert response.status == "queued"
    while response.status in ("queued", "in_progress"):
        time.sleep(0.01)
        response = client.responses.retrieve(response.id)
    assert response.output_text == text_of(chat(("user", "hi")), 20)
    events = list(client.responses.retrieve(response.id, stream=True, starting_after=2))
    assert [e.sequence_number for e in events] == list(range(3, 3 + len(events)))


def test_a_cancelled_response_says_what_it_took(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="mock", input="hi", max_output_tokens=380, background=True
    )
    while response.status == "queued" or not response.output:
        response = client.responses.retrieve(response.id)
    first = client.responses.cancel(response.id)
    again = client.responses.cancel(response.id)
    assert first == again
    assert first.status == "cancelled"
    assert first.usage is not None
    assert first.usage.output_tokens == len(first.output_text)
    assert text_of(chat(("user", "hi")), 380).startswith(first.output_text)


def test_logprobs_come_on_request(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="mock",
        input="hi",
        max_output_tokens=3,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
    )
    part = response.output[0].content[0]  # type: ignore[union-attr]
    assert len(part.logprobs) == 3  # type: ignore[union-attr,arg-type]


def test_a_stream_that_is_cut_can_be_read_on(http: httpx.Client) -> None:
    """At every event: what was read before and what is read on are the whole, nothing twice."""
    whole = events_of(http.post("/v1/responses", json=body(stream=True)).text)
    for cut in range(len(whole) - 1):
        with http.stream("POST", "/v1/responses", json=body(stream=True, store=True)) as response:
            text = ""
            for piece in response.iter_text():
                text += piece
                if text.count("\n\n") > cut:
                    break
            seen = events_of(text)[: cut + 1]
        identifier = seen[0]["response"]["id"]
        headers = {"last-event-id": str(seen[-1]["sequence_number"])}
        url = f"/v1/responses/{identifier}?stream=true"
        rest = events_of(http.get(url, headers=headers).text)
        joined = [*seen, *rest]
        assert [e["sequence_number"] for e in joined] == list(range(len(joined)))
        deltas = [e["delta"] for e in joined if e["type"] == "response.output_text.delta"]
        assert "".join(deltas) == text_of(chat(("user", "hi")), 6)


def test_a_reader_who_leaves_without_a_wish_to_return_ends_it(mock: ServerProcess) -> None:
    with httpx.stream(
        "POST", f"{mock.url}/v1/responses", json=body(stream=True, max_output_tokens=380)
    ) as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
    identifier = json.loads(line[6:])["response"]["id"]
    assert mock.idle(2)
    found = httpx.get(f"{mock.url}/v1/responses/{identifier}").json()
    assert found["status"] == "cancelled"
    assert 0 < found["usage"]["output_tokens"] < 380


def test_a_browser_that_reconnects_goes_on_and_in_the_end_stays_away(http: httpx.Client) -> None:
    """It has the address of its first try, and the header."""
    created = http.post("/v1/responses", json=body()).json()
    url = f"/v1/responses/{created['id']}?stream=true&starting_after=2"
    rest = events_of(http.get(url, headers={"last-event-id": "7"}).text)
    assert rest[0]["sequence_number"] == 8
    last = str(rest[-1]["sequence_number"])
    assert http.get(url, headers={"last-event-id": last}).status_code == 204
    for wrong in ("-2", "99999", "x"):
        assert http.get(url, headers={"last-event-id": wrong}).status_code == 400


def test_what_a_response_took_is_known_by_its_id(http: httpx.Client) -> None:
    created = http.post("/v1/responses", json=body()).json()
    usage = http.get(f"/v1/usage/{created['id']}").json()["usage"]
    assert usage["completion_tokens"] == created["usage"]["output_tokens"] == 6


def test_only_so_many_streams_may_wait_for_their_readers(mock_server: MockFactory) -> None:
    server = mock_server(
        {"detached_streams": 1, "resume_ttl_seconds": 1.0}, delay=0.02, pages=128, context=250
    )
    identifiers = []
    for _ in range(2):
        long = body(stream=True, store=True, max_output_tokens=200)
        with httpx.stream("POST", f"{server.url}/v1/responses", json=long) as response:
            line = next(line for line in response.iter_lines() if line.startswith("data: "))
        identifiers.append(json.loads(line[6:])["response"]["id"])
    time.sleep(0.3)
    found = [httpx.get(f"{server.url}/v1/responses/{i}").json()["status"] for i in identifiers]
    assert found == ["in_progress", "cancelled"]
    assert server.idle(3), "nobody came back, so it ends after a second"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "grammar"}}}, "text"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"background": True, "store": False}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"generate": False}, "generate"),
        ({"n": 2}, "n"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/responses", json=body(**fields))
    assert 400 <= response.status_code < 500, response.text
    assert (response.json()["error"]["param"] or "").split(".")[0] == param


def test_a_failure_midway_is_told(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.02, pages=128, context=250)
    url = f"{server.url}/v1/responses"
    with httpx.stream("POST", url, json=body(stream=True, max_output_tokens=200)) as response:
        lines = response.iter_lines()
        next(lines)
        httpx.post(f"{server.url}/test/fail")
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert rest[-1]["type"] == "response.failed"
    assert rest[-1]["response"]["error"]["code"] == "server_error"
