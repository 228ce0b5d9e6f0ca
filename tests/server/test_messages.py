"""Anthropic's Messages API, by its own client and by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import anthropic
import httpx
import msgspec
import pytest

from engine import Delta, Usage
from server.answer_parser import AnswerParser
from server.answering import _with_short_ids
from server.dialect import HERMES
from server.message_composer import MessageComposer
from server.messages_protocol import CountRequest, template_messages, wishes_of
from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

HELLO: Any = [{"role": "user", "content": "hi"}]


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<{role}>{text}\n" for role, text in turns) + "<assistant>"


@pytest.fixture(scope="module")
def client(mock: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=mock.url, api_key="x", max_retries=0) as client:
        yield client


def test_a_message(client: anthropic.Anthropic) -> None:
    blocks: Any = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    message = client.messages.create(
        model="mock",
        max_tokens=8,
        system="be brief",
        messages=[{"role": "user", "content": blocks}],
        metadata={"user_id": "u"},
    )
    prompt = chat(("system", "be brief"), ("user", "hi"))
    assert message.content[0].text == text_of(prompt, 8)  # type: ignore[union-attr]
    assert (message.stop_reason, message.role, message.type) == (
        "max_tokens",
        "assistant",
        "message",
    )
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(prompt)
    assert usage.output_tokens == 8


def test_a_streamed_message(client: anthropic.Anthropic) -> None:
    expected = text_of(chat(("user", "hi")), 8)
    with client.messages.stream(model="mock", max_tokens=8, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.content[0].text == expected  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 8)
    kinds = [
        event.type
        for event in client.messages.create(model="mock", max_tokens=3, messages=HELLO, stream=True)
    ]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    text = text_of(chat(("user", "hi")), 20)
    stop = text[4:6]
    message = client.messages.create(
        model="mock", max_tokens=50, messages=HELLO, stop_sequences=[stop]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]


def test_the_assistants_beginning_is_gone_on_with(client: anthropic.Anthropic) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well,"}]
    message = client.messages.create(model="mock", max_tokens=5, messages=messages)
    assert message.content[0].text == text_of("<user>hi\n<assistant>Well,", 5)  # type: ignore[union-attr]


def test_tokens_are_counted_and_models_listed(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="mock", system="be brief", messages=HELLO)
    assert count.input_tokens == len(chat(("system", "be brief"), ("user", "hi")))
    (model,) = client.models.list()
    assert (model.id, model.display_name) == ("mock", "mock")


def test_errors_have_anthropics_shape(client: anthropic.Anthropic, mock: ServerProcess) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=1, messages=HELLO)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="text, tool_use and tool_result are"):
        client.messages.create(model="mock", max_tokens=1, messages=image)
    tool: Any = [{"type": "web_search_20250305", "name": "web_search"}]
    with pytest.raises(anthropic.BadRequestError, match=r"tools.\[0\].type is not supported"):
        client.messages.create(model="mock", max_tokens=1, messages=HELLO, tools=tool)
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        client.messages.create(model="mock", max_tokens=2048, messages=HELLO, thinking=thinking)
    missing = httpx.post(f"{mock.url}/v1/messages", json={"model": "mock", "messages": HELLO})
    assert missing.status_code == 400
    assert missing.json()["type"] == "error"
    assert missing.json()["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in missing.json()["error"]["message"]


def test_keys_come_anthropics_way(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["secret"]})
    right = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)
    assert right.messages.create(model="mock", max_tokens=1, messages=HELLO)
    wrong = anthropic.Anthropic(base_url=server.url, api_key="guess", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model="mock", max_tokens=1, messages=HELLO)
    right.close()
    wrong.close()


def test_a_failure_midway_is_an_error_event(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.02, pages=128, context=250)
    client = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
    stream = client.messages.create(model="mock", max_tokens=200, messages=HELLO, stream=True)
    next(iter(stream))
    httpx.post(f"{server.url}/test/fail")
    with pytest.raises(anthropic.APIStatusError, match="step failed"):
        list(stream)
    client.close()


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def wide(roomy: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=roomy.url, api_key="x", max_retries=0) as client:
        yield client


def call(client: anthropic.Anthropic, **more: Any) -> Any:
    options: dict[str, Any] = {
        "model": "mock",
        "max_tokens": 150,
        "messages": HELLO,
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    return client.messages.create(**options | more)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_tool_is_called(wide: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    made = call(wide, tool_choice=choice | {"disable_parallel_tool_use": True})
    (block,) = made.content
    assert (block.type, block.name, made.stop_reason) == ("tool_use", "weather", "tool_use")
    assert block.id.startswith("toolu_")
    assert list(block.input) == ["city"]


def test_a_call_streams_as_its_whole(wide: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    with wide.messages.stream(model="mock", max_tokens=150, messages=HELLO, **options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].input == call(wide).content[0].input  # type: ignore[union-attr]
    assert final.stop_reason == "tool_use"
    assert kinds.count("content_block_start") == 1
    assert kinds.count("input_json") > 5


def test_results_go_back_to_the_model(wide: anthropic.Anthropic) -> None:
    made = call(wide)
    (block,) = made.content
    spoken: list[Any] = [*HELLO, {"role": "assistant", "content": made.content}]

    def count(result: dict[str, Any], *more: dict[str, Any]) -> int:
        told = {"type": "tool_result", "tool_use_id": block.id, **result}
        turn: Any = {"role": "user", "content": [told, *more]}
        answer = call(wide, messages=[*spoken, turn], tool_choice={"type": "auto"}, max_tokens=3)
        usage = answer.usage
        return int(usage.input_tokens + usage.cache_read_input_tokens)

    nothing = count({})
    assert count({"content": "it rains"}) == nothing + len("it rains")
    assert count({"content": [{"type": "text", "text": "it rains"}]}) == nothing + len("it rains")
    assert count({"content": "rain", "is_error": True}) == nothing + len("error: rain")
    assert count({"content": "it"}, {"type": "text", "text": "and?"}) >= nothing + len("it and?")


def test_unforced_tools_are_shown_and_unwanted_ones_are_not(wide: anthropic.Anthropic) -> None:
    def count(**more: Any) -> int:
        answer: Any = wide.messages.count_tokens(model="mock", messages=HELLO, **more)
        return int(answer.input_tokens)

    assert count(tools=[TOOL]) > count() + len("weather")
    assert count(tools=[TOOL], tool_choice={"type": "none"}) == count()


def test_an_answer_can_be_held_to_a_schema(wide: anthropic.Anthropic) -> None:
    form: Any = {"type": "json_schema", "schema": SCHEMA}
    for options in ({"output_config": {"format": form}}, {"extra_body": {"output_format": form}}):
        made: Any = wide.messages.create(model="mock", max_tokens=150, messages=HELLO, **options)
        assert list(json.loads(made.content[0].text)) == ["city"]
        assert made.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"tools": [TOOL, TOOL]}, r"tools.\[1\]"),
        ({"tools": [{"name": "a b"}]}, r"tools.\[0\].name"),
        ({"tools": [TOOL | {"input_schema": 7}]}, r"tools.\[0\].input_schema"),
        (
            {"tools": [TOOL | {"input_schema": {"properties": {"a": {"not": {}}}}}]},
            r"tools.\[0\].input_schema",
        ),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"tool_choice": {"type": []}}, "tool_choice.type"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"output_config": {"effort": "mad"}}, "output_config.effort"),
        ({"output_config": {"depth": 1}}, "output_config.depth"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(roomy: ServerProcess, body: dict[str, Any], place: str) -> None:
    options = {"model": "mock", "max_tokens": 4, "messages": HELLO, "tools": [TOOL]}
    forced = {"tool_choice": {"type": "any"}}
    answer = httpx.post(f"{roomy.url}/v1/messages", json=options | forced | body)
    assert answer.status_code == 400
    assert re.match(place, answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("turn", "place"),
    [
        ({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}, "tool_use"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}, "an id, a name"),
        ({"role": "user", "content": [{"type": "tool_use"}]}, "not supported"),
    ],
    ids=str,
)
def test_broken_turns_are_refused_by_place(
    roomy: ServerProcess, turn: dict[str, Any], place: str
) -> None:
    body = {"model": "mock", "max_tokens": 4, "messages": [*HELLO, turn]}
    answer = httpx.post(f"{roomy.url}/v1/messages", json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("messages.1")
    assert place in message


def test_thinking_is_a_block_before_the_text() -> None:
    parser = partial(AnswerParser, style=HERMES, names=["f"], thinking=("<think>", "</think>"))
    text = '<think>hm</think>So.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    composer = MessageComposer("msg_1", "m", 3, parser)
    events = composer.begin()
    for character in text:
        events += composer.delta(Delta(text=character))
    usage = Usage(prompt_tokens=3, completion_tokens=9)
    events += composer.delta(Delta(finish_reason="stop", usage=usage)) + composer.end()
    thinking, said, made = composer.body()["content"]
    assert thinking == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert said == {"type": "text", "text": "So."}
    assert (made["name"], made["input"]) == ("f", {"a": 1})
    assert composer.body()["stop_reason"] == "tool_use"
    starts = [e["index"] for e in events if e["type"] == "content_block_start"]
    stops = [e["index"] for e in events if e["type"] == "content_block_stop"]
    assert starts == stops == [0, 1, 2]
    for index, kind in enumerate(("thinking", "text", "partial_json")):
        told = [e["delta"] for e in events if e.get("index") == index and "delta" in e]
        assert "".join(d[kind] for d in told) == ("hm", "So.", '{"a": 1}')[index]


@pytest.mark.parametrize(
    ("thinking", "effort", "budget"),
    [
        (None, None, None),
        ({"type": "adaptive"}, None, None),
        ({"type": "disabled"}, "none", None),
        ({"type": "enabled", "budget_tokens": 2048}, None, 2048),
    ],
)
def test_how_much_is_thought(thinking: Any, effort: str | None, budget: int | None) -> None:
    wishes = wishes_of(CountRequest(messages=[], thinking=thinking))
    assert (wishes.effort, wishes.budget) == (effort, budget)
    louder = CountRequest(messages=[], thinking=thinking, output_config={"effort": "max"})
    assert wishes_of(louder).effort == (effort or "xhigh")


@pytest.mark.parametrize("arguments", ['{"path": "/tmp", "dry_run": tru', '{"x": oops', "[1]"])
def test_a_call_that_was_cut_off_is_none(arguments: str) -> None:
    parser = partial(AnswerParser, style=HERMES, names=["f"])
    composer = MessageComposer("msg_1", "m", 3, parser)
    composer.begin()
    composer.delta(Delta(text=f'<tool_call>{{"name": "f", "arguments": {arguments}'))
    composer.delta(Delta(finish_reason="stop"))
    composer.end()
    body = composer.body()
    assert body["stop_reason"] != "tool_use"
    assert not any(block["type"] == "tool_use" for block in body["content"])


def test_turns_of_one_role_are_one() -> None:
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "d"}]},
    ]
    body = msgspec.convert({"messages": turns}, CountRequest)
    messages = template_messages(body)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[0]["content"] == "a\nb"
    assert messages[1]["content"] == "c"
    assert messages[1]["tool_calls"][0]["id"] == "1"


@pytest.mark.parametrize("form", ["json", [1], 7])
def test_forms_that_are_none_are_refused(roomy: ServerProcess, form: Any) -> None:
    body = {"model": "mock", "max_tokens": 4, "messages": HELLO, "output_config": {"format": form}}
    answer = httpx.post(f"{roomy.url}/v1/messages", json=body)
    assert answer.status_code == 400


def test_mistrals_templates_get_ids_that_they_take() -> None:
    call = {"id": "toolu_abcdefghi", "type": "function", "function": {"name": "f"}}
    asked = _with_short_ids({"role": "assistant", "content": "", "tool_calls": [call]})
    told = _with_short_ids({"role": "tool", "tool_call_id": "toolu_abcdefghi", "content": ""})
    assert asked["tool_calls"][0]["id"] == told["tool_call_id"]
    assert re.fullmatch("[a-z0-9]{9}", told["tool_call_id"])
    assert _with_short_ids({"role": "tool", "tool_call_id": "abcdefghi"})["tool_call_id"] == (
        "abcdefghi"
    )
