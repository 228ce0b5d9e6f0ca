"""Fields and headers beyond the plain answer, over HTTP against a real server process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

CHAT: dict[str, Any] = {
    "model": "mock",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
}
PROMPT = b"<user>hi\n<assistant>"


@pytest.fixture(scope="module")
def http(mock: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=mock.url, timeout=20) as client:
        yield client


def plain(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "mock", "prompt": prompt, "max_tokens": 6} | more


def answer(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = http.post(path, json=body | {"stream": True}).text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(ids: bytes, count: int = 6) -> str:
    return bytes(continuation(list(ids), count)).decode()


def test_only_the_last_tokens_of_a_truncated_prompt_count(http: httpx.Client) -> None:
    body = plain(["abcdef", "xy"], truncate_prompt_tokens=3, echo=True)
    first, second = answer(http, "/v1/completions", body)["choices"]
    assert first["text"] == "def" + text_of(b"def")
    assert second["text"] == "xy" + text_of(b"xy")
    chat = answer(http, "/v1/chat/completions", CHAT | {"truncate_prompt_tokens": 5})
    assert chat["choices"][0]["message"]["content"] == text_of(PROMPT[-5:])


def test_token_ids_are_shown_on_request(http: httpx.Client) -> None:
    made = continuation(list(PROMPT), 6)
    chat = answer(http, "/v1/chat/completions", CHAT | {"return_token_ids": True})
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == (list(PROMPT), made)
    streamed = chunks(http, "/v1/chat/completions", CHAT | {"return_token_ids": True})
    assert streamed[0]["prompt_token_ids"] == list(PROMPT)
    assert all("prompt_token_ids" not in chunk for chunk in streamed[1:])
    assert [t for c in streamed for t in c["choices"][0].get("token_ids", [])] == made
    (choice,) = answer(http, "/v1/completions", plain("ab", return_token_ids=True))["choices"]
    assert choice["prompt_token_ids"] == [97, 98]
    assert choice["token_ids"] == continuation([97, 98], 6)


def test_usage_can_come_with_every_chunk(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = chunks(http, "/v1/completions", plain("ab", stream_options=options))
    made = [event["usage"]["completion_tokens"] for event in events]
    assert made == sorted(made)
    assert made[-1] == 6
    assert last["usage"]["total_tokens"] == 8


def test_a_salt_parts_the_cache(http: httpx.Client) -> None:
    def cached(salt: str | None) -> int:
        body = plain("a long prompt that fills several pages of the cache", cache_salt=salt)
        usage = answer(http, "/v1/completions", body)["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached("mine"), cached("mine") > 8, cached("yours"), cached(None)] == [0, True, 0, 0]


def test_the_assistants_message_can_be_continued(http: httpx.Client) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Well, "}]
    body = CHAT | {"messages": messages, "continue_final_message": True}
    content = answer(http, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert content == text_of(b"<user>hi\n<assistant>Well,")


def test_a_model_that_cannot_chat_is_422(mock_server: MockFactory) -> None:
    server = mock_server(chat_template=None)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.UnprocessableEntityError, match="no chat template") as caught,
    ):
        client.chat.completions.create(**CHAT)
    assert (caught.value.code, caught.value.param) == ("no_chat_template", "messages")


def test_a_suffix_takes_a_model_that_fills_in(http: httpx.Client) -> None:
    error = http.post("/v1/completions", json=plain("a", suffix="b")).json()["error"]
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")


def test_a_model_that_fills_in_gets_prefix_and_suffix(mock_server: MockFactory) -> None:
    server = mock_server(infill=True)
    body = plain("ab", suffix="yz", return_token_ids=True)
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    (choice,) = answer["choices"]
    prefix, suffix, middle = 257, 258, 259
    assert choice["prompt_token_ids"] == [prefix, 97, 98, suffix, 121, 122, middle]
    assert choice["token_ids"] == continuation(choice["prompt_token_ids"], 6)
    error = httpx.post(f"{server.url}/v1/completions", json=body | {"echo": True}).json()["error"]
    assert error["param"] == "echo"


def test_usage_is_kept_by_id_also_of_what_was_cut(http: httpx.Client) -> None:
    whole = answer(http, "/v1/completions", plain(["ab", "cde"]))
    kept = http.get(f"/v1/usage/{whole['id']}").json()
    assert (kept["usage"], kept["finish_reason"]) == (whole["usage"], "length")
    with http.stream("POST", "/v1/completions", json=plain("ab", max_tokens=300, stream=True)) as r:
        first = next(line for line in r.iter_lines() if line.startswith("data: "))
    identifier = json.loads(first[6:])["id"]
    for _ in range(200):
        cut = http.get(f"/v1/usage/{identifier}")
        if cut.status_code == 200:
            break
    body = cut.json()
    assert body["finish_reason"] == "cancelled"
    assert body["usage"]["prompt_tokens"] == 2
    assert 0 < body["usage"]["completion_tokens"] < 300
    assert http.get("/v1/usage/cmpl-nothing").status_code == 404


def test_every_answer_says_what_may_still_be_asked(http: httpx.Client) -> None:
    headers = http.post("/v1/completions", json=plain("ab")).headers
    assert int(headers["x-ratelimit-remaining-requests"]) <= int(
        headers["x-ratelimit-limit-requests"]
    )
    assert int(headers["x-ratelimit-remaining-tokens"]) > 0
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    named = http.post("/v1/completions", json=plain("ab"), headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"


def test_a_client_is_told_not_to_repeat_what_cannot_help(http: httpx.Client) -> None:
    late = http.post("/v1/completions", json=plain("ab", max_tokens=390, deadline_ms=40))
    assert (late.status_code, late.headers["x-should-retry"]) == (408, "false")


def test_a_slow_stream_is_kept_alive(mock_server: MockFactory) -> None:
    server = mock_server({"keepalive_seconds": 0.1}, delay=0.3)
    text = httpx.post(
        f"{server.url}/v1/completions", json=plain("ab", stream=True, max_tokens=3), timeout=20
    ).text
    assert text.count(": keep-alive\n\n") >= 2
    assert text.endswith("data: [DONE]\n\n")


def test_a_failure_midway_is_an_error_event(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.02, pages=128, context=250)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=plain("ab", stream=True, max_tokens=200)
    ) as response:
        lines = response.iter_lines()
        next(lines)
        httpx.post(f"{server.url}/test/fail")
        rest = list(lines)
    assert "event: error" in rest
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    stream = client.completions.create(model="mock", prompt="ab", max_tokens=200, stream=True)
    next(iter(stream))
    httpx.post(f"{server.url}/test/fail")
    with pytest.raises(openai.APIError, match="step failed"):
        list(stream)
    client.close()
