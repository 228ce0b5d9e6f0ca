"""Bad input: always a clear 4xx in OpenAI's shape, never a 5xx, and the server goes on serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from server.protocol import HARMLESS, ChatRequest, CompletionRequest
from tests.server.process import ServerProcess

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PLAIN = {"model": "mock", "prompt": "hi", "max_tokens": 2}
ENDPOINTS = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN}

# Values that are wrong for each kind of field; None stands for "leave it to the general ones".
WRONG_NUMBERS: list[Any] = ["1", [], {}, True, 1e300, -1e300, 2**70]
WRONG_INTEGERS: list[Any] = [*WRONG_NUMBERS, 0.5]
WRONG: dict[str, list[Any]] = {
    "model": [1, [], "", "x" * 10_000],
    "messages": [
        "hi",
        [],
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "x", "content": "y"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        [{"role": "user", "content": "x" * 100_000}],
        [None],
        {"role": "user"},
    ],
    "prompt": [
        None,
        5,
        [],
        {},
        [None],
        ["a", 1],
        [[1], "a"],
        [1.5],
        [True],
        [[]],
        [[-1]],
        [2**70],
        [300],
        "",
        "x" * 100_000,
        ["a"] * 300,
        [["a"]],
    ],
    "stream": ["yes", 1, []],
    "stream_options": [1, {"include_usage": True}, {"include_usage": 1}],
    "max_tokens": [*WRONG_INTEGERS, -1],
    "deadline_ms": [*WRONG_NUMBERS, 0],
    "target_itl_ms": [*WRONG_NUMBERS, 0],
    "max_completion_tokens": [*WRONG_INTEGERS, 0, -1],
    "temperature": [*WRONG_NUMBERS, -0.1, 2.1],
    "top_p": [*WRONG_NUMBERS, 0, -0.1, 1.1],
    "n": [*WRONG_INTEGERS, 0, -1, 129],
    "stop": [1, [1], {}, "", [""], ["a"] * 17],
    "seed": ["1", [], 0.5, 2**70],
    "presence_penalty": [*WRONG_NUMBERS, 2.1],
    "frequency_penalty": [*WRONG_NUMBERS, -2.1],
    "logit_bias": [1, [], {"a": 1}, {"1": "x"}, {"1": 101}, {"1000": 1}, {"-1": 1}],
    "user": [1, []],
    "top_k": [*WRONG_INTEGERS, -2],
    "min_p": [*WRONG_NUMBERS, -1, 1.5],
    "min_tokens": [*WRONG_INTEGERS, -1, 3],
    "repetition_penalty": [*WRONG_NUMBERS, 0],
    "stop_token_ids": [1, ["a"], [1000], [-1]],
    "include_stop_str_in_output": [1, "x"],
    "ignore_eos": [1, "x"],
    "skip_special_tokens": [1, "x"],
    "prompt_logprobs": [*WRONG_INTEGERS, -1, 21],
    "priority": [*WRONG_INTEGERS, 1001],
    "top_logprobs": [*WRONG_INTEGERS, 5],
    "metadata": [1, {"a": 1}],
    "store": [1, True],
    "service_tier": [1, "flex"],
    "parallel_tool_calls": [1],
    "tools": [
        1,
        [{}],
        [{"type": "web_search"}],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {"name": "f", "parameters": 1}}],
        [{"type": "function", "function": {"name": "f", "description": 1}}],
        [{"type": "function", "function": {"name": "f"}}] * 2,
        [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)],
    ],
    "tool_choice": ["required", {"type": "function"}],
    "reasoning_effort": [1, "very"],
    "thinking_token_budget": [*WRONG_INTEGERS, -1, 5],
    "chat_template_kwargs": [1, []],
    "functions": [1, [{}]],
    "function_call": [{"name": "f"}],
    "response_format": [
        1,
        {"type": "other"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
    ],
    "structured_outputs": [1, {"json": 1}, {"regex": "("}, {"other": 1}, {"choice": []}],
    "guided_json": [1, "{", {"type": "strin"}],
    "guided_regex": [1, "("],
    "guided_choice": [1, [], [1]],
    "guided_grammar": [1, "root ::= x"],
    "grammar": [1, "start: x"],
    "modalities": [["audio"], 1],
    "audio": [{}],
    "prediction": [{}],
    "verbosity": ["low"],
    "web_search_options": [{}],
    "echo": [1, "x"],
    "best_of": [*WRONG_INTEGERS, 2],
    "suffix": [1, "after"],
    "cache_salt": [1, ""],
    "return_token_ids": [1, "x"],
    "truncate_prompt_tokens": [*WRONG_INTEGERS, 0, -1],
    "add_generation_prompt": [1, None],
    "continue_final_message": [1, True],
    "prompt_cache_key": [1],
    "safety_identifier": [1],
}
# What no endpoint can honour yet.
WRONG |= {name: [{"x": 1}] for name in HARMLESS if name not in WRONG}
# `logprobs` is a flag in one endpoint and a count in the other.
LOGPROBS = {"/v1/chat/completions": [1, "x", []], "/v1/completions": [True, -1, 21, 0.5, "1"]}


@pytest.fixture(scope="module")
def http(mock: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=mock.url, timeout=20) as client:
        yield client


def encode(body: Any) -> bytes:
    return json.dumps(body).encode()  # lone surrogates stay escapes


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    data = body if isinstance(body, bytes) else encode(body)
    return http.post(path, content=data, headers={"content-type": "application/json"})


def assert_error(response: httpx.Response, status: int | None = None) -> dict[str, Any]:
    assert 400 <= response.status_code < 500, response.text
    if status is not None:
        assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error  # type: ignore[no-any-return]


def cases() -> Iterator[tuple[str, str, Any]]:
    for path, kind in (
        ("/v1/chat/completions", ChatRequest),
        ("/v1/completions", CompletionRequest),
    ):
        for field in kind.__struct_fields__:
            values = LOGPROBS[path] if field == "logprobs" else WRONG[field]
            for value in values:
                yield path, field, value


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_with_every_wrong_value_is_refused_by_name(
    http: httpx.Client, path: str
) -> None:
    tried = 0
    for where, field, value in cases():
        if where != path:
            continue
        body = ENDPOINTS[path] | {field: value}
        if field == "top_logprobs" and isinstance(value, int):
            body |= {"logprobs": value != 5}
        error = assert_error(post(http, path, body))
        named = (error["param"] or "").split(".")[0]
        expected = "messages" if field == "continue_final_message" and value is True else field
        assert named == expected, f"{field}={str(value)[:50]!r}: {error}"
        tried += 1
    assert tried > 100
    assert post(http, path, ENDPOINTS[path]).status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"\xff\xfe", 400),
        (b'{"model": "\xff"}', 400),
        (b"[" * 50_000, 400),
        (b'{"prompt":' + b"[" * 50_000, 400),
        (b'{"a":' * 50_000, 400),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', 400),
        (b"{}", 400),
        (b'{"model": NaN}', 400),
        (rb'{"model": "mock", "prompt": "\ud800", "messages": [{"role": "\udfff"}]}', 400),
    ],
    ids=range(14),
)
def test_bodies_that_are_not_requests(
    http: httpx.Client, path: str, data: bytes, status: int
) -> None:
    assert_error(post(http, path, data), status)


def test_other_content_types_are_415(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        response = http.post(
            "/v1/completions", content=encode(PLAIN), headers={"content-type": kind}
        )
        assert assert_error(response, 415)["code"] == "unsupported_media_type"
    fine = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/completions", content=encode(PLAIN), headers=fine).status_code == 200


def test_unknown_paths_and_methods_keep_the_shape(http: httpx.Client) -> None:
    assert assert_error(http.get("/v2/x"), 404)["code"] == "not_found"
    response = http.get("/v1/completions")
    assert assert_error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_bodies_over_the_cap_are_413(http: httpx.Client) -> None:
    large = b" " * (8 * 1024 * 1024 + 1)
    headers = {"content-type": "application/json"}
    declared = http.post("/v1/completions", content=large, headers=headers)
    assert assert_error(declared, 413)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * (1024 * 1024)

    assert_error(http.post("/v1/completions", content=chunks(), headers=headers), 413)


def test_more_sequences_than_the_queue_holds_is_not_a_matter_of_waiting(http: httpx.Client) -> None:
    body = {"model": "mock", "prompt": ["a"] * 250, "n": 5, "max_tokens": 1}
    error = assert_error(post(http, "/v1/completions", body), 400)
    assert error["param"] == "n"


def test_unknown_fields_are_served_with_a_warning(http: httpx.Client) -> None:
    body = PLAIN | {"flavour": 1, "bad\nname": 2, "<script>": 3}
    response = post(http, "/v1/completions", body)
    assert response.status_code == 200
    assert response.headers["x-ryzanstein-warning"] == "unknown fields ignored: flavour"


def test_harmless_values_of_unsupported_fields_are_accepted(http: httpx.Client) -> None:
    body = CHAT | {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False,
        "modalities": ["text"], "service_tier": "auto", "parallel_tool_calls": True, "user": "me",
        "metadata": {"a": "b"}, "logprobs": None, "stop": None, "seed": None, "stream": None,
        "logit_bias": None, "temperature": None, "priority": 5, "stream_options": None,
    }  # fmt: skip
    assert post(http, "/v1/chat/completions", body).status_code == 200


def test_content_parts_and_developer_messages(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "model": "mock",
        "messages": [
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": parts, "name": "me"},
        ],
    }
    response = post(http, "/tokenize", body)
    text = bytes(response.json()["tokens"]).decode()
    assert text == "<system>be kind\n<user>ab\n<assistant>"


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    answer = post(http, "/tokenize", {"prompt": "hé"}).json()
    assert answer == {"count": 3, "max_model_len": 400, "tokens": list("hé".encode())}
    assert post(http, "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [257]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [2**70]}),
    ):
        assert_error(post(http, path, body), 400)


def test_prompt_logprobs_in_both_endpoints(http: httpx.Client) -> None:
    chat = post(http, "/v1/chat/completions", CHAT | {"prompt_logprobs": 1}).json()
    scores = chat["choices"][0]["prompt_logprobs"]
    assert scores[0] is None
    assert len(scores) == chat["usage"]["prompt_tokens"]
    plain = post(http, "/v1/completions", PLAIN | {"prompt_logprobs": 1}).json()
    second = plain["choices"][0]["prompt_logprobs"][1]
    assert second["105"] == {"logprob": -0.5, "decoded_token": "i"}
    streamed = post(http, "/v1/completions", PLAIN | {"prompt_logprobs": 1, "stream": True})
    assert_error(streamed, 400)


def test_an_unexpected_error_tells_no_details(http: httpx.Client) -> None:
    response = http.get("/test/raise")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_mutation_of_a_request_is_a_server_error(
    http: httpx.Client, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(sorted(ENDPOINTS)))
    fields = (ChatRequest if "chat" in path else CompletionRequest).__struct_fields__
    changes = data.draw(st.dictionaries(st.sampled_from(fields), json_values, max_size=3))
    changes.pop("max_tokens", None)  # keeps what is valid short
    changes.pop("stream", None)
    response = post(http, path, ENDPOINTS[path] | changes)
    if response.status_code != 200:
        assert_error(response)


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ud83d\\ude00 \\ud83d"])
def test_half_of_a_surrogate_pair_is_called_so(http: httpx.Client, half: str) -> None:
    body = json.dumps(PLAIN).replace('"hi"', f'"a{half}b"')
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert f"{half[-6:]} is half of a surrogate pair" in message


async def test_a_websocket_where_there_is_none_is_404(mock: ServerProcess) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://127.0.0.1:{mock.port}/v1/foo"):
            pass
    assert refused.value.response.status_code == 404
    assert b"no WebSocket at" in (refused.value.response.body or b"")


@pytest.mark.parametrize("body", [b'"\\udc\xff\xff"', b'"\\\\ud800",', b'"\\udcab'])
def test_what_only_looks_like_half_a_pair_is_other_wrong_json(
    http: httpx.Client, body: bytes
) -> None:
    whole = b'{"model": "mock", "prompt": ' + body + b"}"
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=whole, headers=headers)
    assert response.status_code == 400
