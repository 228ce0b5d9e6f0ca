"""Answers taken apart: every style, and every way to cut their text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.answer_parser import (
    AnswerParser,
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
    Style,
)
from server.dialect import GEMMA, GENERIC, HERMES, LLAMA, MISTRAL
from server.marked_calls import meaning

NAMES = ("get_weather", "search", "f")
THINK = ("<think>", "</think>")


def parse(pieces_of: list[str], style: Style | None = HERMES, **more: Any) -> list[Piece]:
    parser = AnswerParser(style=style, names=NAMES, **more)
    found = [piece for text in pieces_of for piece in parser.push(text)]
    return found + parser.finish()


def joined(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and calls as names and arguments."""
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case Reasoning(text):
                reasoning += text
            case Content(text):
                content += text
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    return reasoning, content, calls


WEATHER = ("get_weather", {"city": 'Köln "am" Rhein', "days": [1, 2.5, -3e2], "x": {"y": None}})
ARGS = json.dumps(WEATHER[1])
SEARCH = ("search", {"q": "a } b ] c </tool_call> \\ \n {"})

CALL = f'{{"name": "get_weather", "arguments": {ARGS}}}'
PARAMETERS = f'{{"name": "get_weather", "parameters": {ARGS}}}'
TURNED = f'{{"arguments": {ARGS}, "name": "get_weather"}}'
EMPTY = '{"name": "f", "arguments": {}}'
UNKNOWN = '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'
LONG = f'{{"name":"search","arguments":{json.dumps(SEARCH[1])}}}'
QUOTED = '{"name": "f", "arguments": "{\\"a\\": 1}"}'
TWO = '{"name": "f", "parameters": {}}; {"name": "search", "parameters": {"q": ""}}'
NONE = ("f", {})

# Style, text, content, calls.
OUTPUTS: list[tuple[Style, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    (
        HERMES,
        f"Let me see.\n\n<tool_call>\n{TURNED}\n</tool_call>\n<tool_call>{LONG}</tool_call>",
        "Let me see.",
        [WEATHER, SEARCH],
    ),
    (HERMES, f"<tool_call>{QUOTED}</tool_call>", "", [("f", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [NONE]),
    (HERMES, f"<tool_call>[{EMPTY}, {CALL}]</tool_call>", "", [NONE, WEATHER]),
    (HERMES, "a < b and <tool> and <tool_cal", "a < b and <tool> and <tool_cal", []),
    (HERMES, "<tool_call>\nno\n</tool_call> x", "<tool_call>\nno\n</tool_call> x", []),
    (HERMES, UNKNOWN, UNKNOWN, []),
    (HERMES, EMPTY, EMPTY, []),
    (HERMES, f"<tool_call><tool_call>{EMPTY}</tool_call>", "<tool_call>", [NONE]),
    (HERMES, f"<tool_call>{EMPTY}", "", [NONE]),
    (HERMES, f"<tool_call>{EMPTY}</tool_call>\nDone.", "\nDone.", [NONE]),
    (HERMES, f"<tool_call>{EMPTY}\nDone.", "\nDone.", [NONE]),
    (HERMES, "  spaces stay  ", "  spaces stay  ", []),
    (LLAMA, PARAMETERS, "", [WEATHER]),
    (LLAMA, f'<|python_tag|>{{"type": "function", {PARAMETERS[1:]}', "", [WEATHER]),
    (LLAMA, TWO, "", [NONE, ("search", {"q": ""})]),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, "[1, 2, 3] are numbers", "[1, 2, 3] are numbers", []),
    (LLAMA, f"Text {EMPTY}", f"Text {EMPTY}", []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {EMPTY}]", "", [WEATHER, NONE]),
    (
        MISTRAL,
        f"Sure.[TOOL_CALLS]get_weather[ARGS]{ARGS}[TOOL_CALLS]f[CALL_ID]abc123DEF[ARGS]{{}}",
        "Sure.",
        [WEATHER, NONE],
    ),
    (MISTRAL, f"[TOOL_CALLS]get_weather{ARGS}", "", [WEATHER]),
    (GEMMA, f"```json\n{PARAMETERS}\n```", "", [WEATHER]),
    (GEMMA, 'Here:\n```json\n{"a": 1}\n```', 'Here:\n```json\n{"a": 1}\n```', []),
    (GENERIC, CALL, "", [WEATHER]),
    (GENERIC, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    (GENERIC, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), OUTPUTS, ids=lambda v: str(v)[:40])
def test_what_is_found_does_not_depend_on_how_the_text_is_cut(
    style: Style, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    _, found, found_calls = expected = joined(parse([text], style))
    assert found == content
    assert [(name, json.loads(arguments)) for name, arguments in found_calls] == calls
    for cut in range(len(text) + 1):
        assert joined(parse([text[:cut], text[cut:]], style)) == expected
    assert joined(parse(list(text), style)) == expected
    chance = random.Random(text)
    for _ in range(20):
        cuts = sorted(chance.choices(range(len(text) + 1), k=6))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert joined(parse(parts, style)) == expected


@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL, GEMMA, GENERIC], ids=lambda s: s.name)
@given(
    parts=st.lists(
        st.sampled_from(
            [
                "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "```json", "```",
                '{"name": "f", ', '"arguments": ', '"parameters": ', "{", "}", "[", "]", ",", ";",
                '"', "\\", "f", "[ARGS]", " ", "\n", "1.5e", "-", "null", "text", "<", '{"a": 1}',
            ]
        ),
        max_size=14,
    ),
    chance=st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_text_is_cut_anywhere_alike_and_nothing_is_lost(
    style: Style, parts: list[str], chance: random.Random
) -> None:
    text = "".join(parts)
    whole = joined(parse([text], style))
    assert joined(parse(list(text), style)) == whole
    cut = chance.randint(0, len(text))
    assert joined(parse([text[:cut], text[cut:]], style)) == whole
    if not whole[2]:
        assert whole[1] == text  # without calls, it is all content


@pytest.mark.parametrize("end", range(len(OUTPUTS[0][1]) + 1))
def test_an_answer_that_is_cut_off_shows_what_there_is(end: int) -> None:
    text = OUTPUTS[0][1][:end]
    _, content, calls = joined(parse([text]))
    if calls:
        assert ARGS.startswith(calls[0][1])
        assert content == ""
    else:
        assert content == text


def test_arguments_stream_while_they_are_written() -> None:
    parser = AnswerParser(style=HERMES, names=NAMES)
    parser.push('<tool_call>{"name": "f", "arguments": {"long": "')
    assert parser.push("some text") == [CallArguments(0, "some text")]


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", False, ("why", "because")),
        ("why\n</think>\n\nbecause", True, ("why", "because")),
        ("<think>why</think>because", True, ("why", "because")),
        ("because", False, ("", "because")),
        ("<thin ice", False, ("", "<thin ice")),
        ("<thin ice</think>x", True, ("<thin ice", "x")),
        ("\n<think></think>\nx", False, ("", "x")),
        ("<think>never ends < / </thin", False, ("never ends < / </thin", "")),
        ("", False, ("", "")),
        ("", True, ("", "")),
        ("a <think> b", False, ("", "a <think> b")),
    ],
)
@pytest.mark.parametrize("style", [None, HERMES, LLAMA], ids=["plain", "hermes", "llama3"])
def test_reasoning_comes_before_the_answer(
    text: str, begun: bool, expected: tuple[str, str], style: Style | None
) -> None:
    whole = joined(parse([text], style, thinking=THINK, begun=begun))
    assert whole[:2] == expected
    assert joined(parse(list(text), style, thinking=THINK, begun=begun)) == whole


def test_calls_follow_reasoning_and_none_is_made_within_it() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>I could {call}</think>\n{call}"
    whole = joined(parse([text], thinking=THINK))
    assert whole == (f"I could {call}", "", [("f", "{}")])
    assert joined(parse(list(text), thinking=THINK)) == whole


def test_deep_nesting_is_no_call() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}"
    _, content, calls = joined(parse([text]))
    assert calls[0][0] == "f"
    assert content


SCHEMAS: dict[str, Any] = {
    "get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "f": {"properties": {"a": {"type": ["string", "null"]}, "b": {"enum": ["5", 6]}}},
}
GLM = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n"
GLM += "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
QWEN = "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n"
QWEN += "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (GLM, "", [("get_weather", '{"city": "12", "days": 3}')]),
        (GLM.replace("\n", ""), "", [("get_weather", '{"city": "12", "days": 3}')]),
        (QWEN, "", [("get_weather", '{"city": "12", "days": 3}')]),
        ("So: " + GLM + "\n" + QWEN, "So:", [("get_weather", '{"city": "12", "days": 3}')] * 2),
        ("<tool_call>search\n</tool_call>", "", [("search", "{}")]),
        ("<tool_call>\n<function=search>\n</function>\n</tool_call> ok", " ok", [("search", "{}")]),
        (
            QWEN.replace("12", "if a < b:\n  <b>\n"),
            "",
            [("get_weather", '{"city": "if a < b:\\n  <b>\\n", "days": 3}')],
        ),
        (
            "<tool_call>f<arg_key>a</arg_key><arg_value>null</arg_value><arg_key>b</arg_key>"
            "<arg_value>5</arg_value><arg_key>c</arg_key><arg_value>[1, {}]</arg_value>"
            "<arg_key>d</arg_key><arg_value>x y</arg_value></tool_call>",
            "",
            [("f", '{"a": null, "b": "5", "c": [1, {}], "d": "x y"}')],
        ),
        (GLM.replace("get_weather", "other"), GLM.replace("get_weather", "other"), []),
        (QWEN.replace("get_weather", "other"), QWEN.replace("get_weather", "other"), []),
        ("<tool_call> is a mark.", "<tool_call> is a mark.", []),
        ("<tool_call><b>bold</b>", "<tool_call><b>bold</b>", []),
        (GLM[:70], "", [("get_weather", "")]),
        # Marks that are missing cost no more than what they belong to.
        (
            "<tool_call>\n<function=search>\n</tool_call>\nSorry.",
            "\nSorry.",
            [("search", "{}")],
        ),
        (
            QWEN.replace("\n</function>", "") + " Done.",
            " Done.",
            [("get_weather", '{"city": "12", "days": 3}')],
        ),
        ("<tool_call><", "<tool_call><", []),
        ("<tool_call>get_weather\n<", "<tool_call>get_weather\n<", []),
    ],
)
def test_arguments_may_be_marked_one_by_one(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert joined(parse([text], schemas=SCHEMAS)) == ("", content, calls)
    assert joined(parse(list(text), schemas=SCHEMAS)) == ("", content, calls)


NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ROOT = {"$defs": {"unit": {"enum": ["C", "12"]}, "loop": {"$ref": "#/$defs/loop"}}}


@pytest.mark.parametrize(
    ("text", "schema", "wanted"),
    [
        ("12", {"type": "string"}, '"12"'),
        ("12", {"type": "integer"}, "12"),
        ("12", {}, "12"),
        ("12", None, "12"),
        ("12", NULLABLE, '"12"'),
        ("null", NULLABLE, "null"),
        ("None", NULLABLE, "null"),
        ("None", {"type": ["integer", "null"]}, "null"),
        ("True", {"type": "boolean"}, "true"),
        ("\nfalse\n", {"type": "boolean"}, "false"),
        ("True", {}, '"True"'),
        ("12", {"$ref": "#/$defs/unit"}, '"12"'),
        ("13", {"$ref": "#/$defs/unit"}, "13"),
        ("13", {"$ref": "#/$defs/loop"}, "13"),
        ("13", {"$ref": "#/$defs/missing"}, "13"),
        ("NaN", {"type": "number"}, '"NaN"'),
        ("1e999", {"type": "number"}, '"1e999"'),
        ("a b", {"type": "integer"}, '"a b"'),
        ('{"a": [1, "é"]}', {"type": "object"}, '{"a": [1, "é"]}'),
        ("C", {"const": "C"}, '"C"'),
    ],
)
def test_a_bare_value_is_what_its_schema_takes(text: str, schema: Any, wanted: str) -> None:
    assert meaning(text, schema, ROOT) == wanted
    json.loads(wanted)
