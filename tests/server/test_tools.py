"""Tools and forms through OpenAI's client, against a server whose model writes letters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field

from engine import InvalidRequest
from server.dialect import GENERIC, taught
from server.tools import arguments_of, offered_tools
from tests.server.process import ServerProcess

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def client(roomy: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    options = {"model": "mock", "messages": HELLO, "max_tokens": 150} | more
    return client.chat.completions.create(**options)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_is_made_and_matches(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, n=2)
    for given in answer.choices:
        assert given.finish_reason == "tool_calls"
        assert given.message.content is None
        (call,) = given.message.tool_calls
        assert call.function.name == "get_weather"
        jsonschema_rs.validate(SCHEMA, json.loads(call.function.arguments))
    ids = [given.message.tool_calls[0].id for given in answer.choices]
    assert len(set(ids)) == 2


def test_a_call_streams_in_parts_that_join_to_the_whole(client: openai.OpenAI) -> None:
    chunks = [
        chunk.choices[0]
        for chunk in ask(
            client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True
        )
    ]
    calls = [call for c in chunks for call in c.delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather"
    assert calls[0].id
    assert all(call.index == 0 and call.id is None for call in calls[1:])
    arguments = "".join(call.function.arguments for call in calls)
    jsonschema_rs.validate(SCHEMA, json.loads(arguments))
    assert len(calls) > 5
    assert not any(c.delta.content for c in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_a_call_tools_change_nothing_about_the_answer(client: openai.OpenAI) -> None:
    """The mock's letters are no call; `none` does not even show the tools."""
    plain = ask(client, max_tokens=20)
    unshown = ask(client, max_tokens=20, tools=[TOOL], tool_choice="none")
    shown = ask(client, max_tokens=20, tools=[TOOL, OTHER])
    assert unshown.choices[0].message.content == plain.choices[0].message.content
    assert unshown.usage.prompt_tokens == plain.usage.prompt_tokens
    assert shown.usage.prompt_tokens > plain.usage.prompt_tokens
    assert len(shown.choices[0].message.content) == 20
    assert shown.choices[0].message.tool_calls is None


def test_calls_and_results_are_part_of_the_conversation(client: openai.OpenAI) -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "other", "arguments": "{}"}}
    spoken = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a1", "content": "it rains"},
    ]
    longer = ask(client, messages=spoken, tools=[OTHER], max_tokens=5)
    shorter = ask(client, messages=HELLO, tools=[OTHER], max_tokens=5)
    assert longer.usage.prompt_tokens > shorter.usage.prompt_tokens + len("it rains")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages.[1].tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": "no"}, "messages.[1].tool_call_id"),
        ({"role": "function", "content": "x", "name": "f"}, "messages.[1].role"),
        ({"role": "assistant"}, "messages.[1].content"),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}
                ],
            },
            "messages.[1].tool_calls.[0].function.arguments",
        ),
    ],
    ids=str,
)
def test_broken_turns_are_refused_by_place(
    client: openai.OpenAI, message: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, messages=[*HELLO, message])
    assert refused.value.param == param


def test_a_schema_that_cannot_be_enforced_names_its_tool(client: openai.OpenAI) -> None:
    bad = {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}
    tools = [TOOL, {"type": "function", "function": bad}]
    with pytest.raises(openai.BadRequestError, match="not cannot be enforced") as refused:
        ask(client, tools=tools, tool_choice="required")
    assert refused.value.param == "tools.[1].function.parameters"
    assert ask(client, tools=tools, max_tokens=3)  # nothing is enforced


class City(BaseModel):
    name: str = Field(max_length=6)
    size: Literal["small", "large"]


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="mock", messages=HELLO, max_tokens=150, response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, "[a-c]{4}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_regex": "[x-z]{2}"}, "[x-z]{2}"),
        ({"guided_choice": ["up"]}, "up"),
        ({"guided_json": {"enum": [1, 2]}}, "[12]"),
        ({"guided_grammar": 'start: "p" /[0-9]/'}, "p[0-9]"),
        ({"grammar": 'root ::= "g" [0-9]'}, "g[0-9]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_every_name_of_a_form(
    client: openai.OpenAI, path: str, fields: dict[str, Any], pattern: str
) -> None:
    body = {"model": "mock", "max_tokens": 150, **fields}
    body |= {"messages": HELLO} if "chat" in path else {"prompt": "hi"}
    answer = client.post(path, body=body, cast_to=dict[str, Any])
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert choice["finish_reason"] == "stop"
    jsonschema_rs.validate({"type": "string", "pattern": f"^({pattern})$"}, text.replace("\n", ""))


def test_any_json_object(client: openai.OpenAI) -> None:
    """The mock goes on with letters as long as it may; what it has written began an object."""
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=12)
    assert answer.choices[0].message.content.startswith("{")


def test_two_forms_contradict(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="give one"):
        ask(client, extra_body={"guided_regex": "a", "guided_choice": ["b"]})


def test_a_template_without_tools_is_taught_them() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    told = taught(
        GENERIC,
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "1", "content": "two"},
        ],
        [TOOL],
    )
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be kind.\n\n")
    assert '"get_weather"' in told[0]["content"]
    assert told[2]["content"].count('{"name": "f", "arguments": {"a": 1}}') == 2
    assert "one" in told[3]["content"]
    assert "two" in told[3]["content"]


def test_the_responses_api_writes_tools_flat() -> None:
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": True}
    offered = offered_tools([tool], {"type": "function", "name": "f"}, None, flat=True)
    assert offered is not None
    assert (offered.choice, offered.names, offered.enforced) == ("f", {"f"}, True)
    with pytest.raises(InvalidRequest, match="not among the tools"):
        offered_tools([tool], {"type": "function", "name": "g"}, None, flat=True)


RESULT = {"type": "function_call_output", "call_id": "unknown", "output": ""}
FLAT = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]


def test_a_response_holds_its_calls_as_items(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model="mock", input="hi", tools=[FLAT], tool_choice="required",  # type: ignore[list-item]
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = made.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    jsonschema_rs.validate(SCHEMA, json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    after = client.responses.create(
        model="mock", previous_response_id=made.id, input=[result], max_output_tokens=16,  # type: ignore[list-item]
    )  # fmt: skip
    assert after.output[0].type == "message"
    assert after.usage.input_tokens > made.usage.input_tokens - 600
    whole = client.responses.create(
        model="mock",
        input=[{"role": "user", "content": "hi"}, call.model_dump(), result],
        max_output_tokens=16,
    )
    assert whole.output_text == after.output_text
    listed = client.responses.input_items.list(whole.id)
    assert {item.type for item in listed} == {"message", "function_call", "function_call_output"}


def test_a_response_streams_a_calls_arguments(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(
            model="mock", input="hi", tools=[FLAT], tool_choice="required",  # type: ignore[list-item]
            parallel_tool_calls=False, stream=True,
        )
    )  # fmt: skip
    kinds = [event.type for event in events]
    added, done = (
        kinds.index("response.output_item.added"),
        kinds.index("response.output_item.done"),
    )
    assert events[added].item.arguments == ""
    joined = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert joined == events[done].item.arguments
    assert kinds[done - 1] == "response.function_call_arguments.done"
    assert kinds[-1] == "response.completed"


def test_a_response_takes_a_form(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="mock", input="hi", text_format=City)
    assert isinstance(parsed.output_parsed, City)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.[0].type"),
        ({"tools": [{"type": "function"}]}, "tools.[0].name"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": 1}, "text"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.[0]"),
        ({"input": [RESULT]}, "input.[0].tool_call_id"),
        ({"input": [{"type": "image"}]}, "input.[0]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_response_cannot_have_is_refused_by_place(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/responses", body={"model": "mock", "input": "hi", **fields}, cast_to=object)
    assert refused.value.param == param


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a": ' + "[" * 100_000])
def test_deep_arguments_are_refused(client: openai.OpenAI, arguments: str) -> None:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function}
    with pytest.raises(openai.BadRequestError):
        ask(client, messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}])


def test_a_tool_that_is_named_is_called_once() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    named = {"type": "function", "function": {"name": "a"}}
    assert not offered_tools(tools, named, None).parallel
    assert offered_tools(tools, "required", None).parallel
    assert not offered_tools(tools, "required", False).parallel


def test_a_call_that_was_cut_before_its_arguments_may_come_back() -> None:
    assert arguments_of("", "x") == {}
    with pytest.raises(InvalidRequest):
        arguments_of('{"a": ', "x")
