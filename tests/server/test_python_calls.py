"""LFM2's calls, which look like Python's: read as JSON, held to schemas, shown as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.text.chat import ChatTemplate
from server.answer_parser import AnswerParser
from server.answering import for_template
from server.constraints import constraint
from server.dialect import PYTHON, dialect_of
from server.tools import FunctionTool, Offered
from tests.server.test_answer_parser import joined
from tests.server.test_marked_grammar import COMPILERS, TOKENIZERS

TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "pattern": "^[A-Z]"},
        "days": {"type": "integer", "minimum": 1},
        "warm": {"type": "boolean"},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}},
    },
    "required": ["to"],
    "additionalProperties": False,
    "$defs": {"stop": {"enum": ["a", "b"]}},
}
TOOLS = [FunctionTool("trip", "", TRIP), FunctionTool("now", "", {"type": "object"})]
OLDER = ChatTemplate(
    "{% if tools %}<|tool_list_start|>{{ tools }}<|tool_list_end|>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}",
    bos_token="",
    eos_token="",
)


def mark(text: str) -> str:
    return f"<|tool_call_start|>{text}<|tool_call_end|>"


def read(text: str, cut: int = 1) -> tuple[str, list[tuple[str, Any]]]:
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    parser = AnswerParser(style=PYTHON, names=list(schemas), schemas=schemas)
    pieces = [p for at in range(0, len(text), cut) for p in parser.push(text[at : at + cut])]
    _, content, calls = joined([*pieces, *parser.finish()])
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("cut", [1, 9, 1000])
def test_calls_are_read_as_json_however_they_are_cut(cut: int) -> None:
    text = (
        r"""I look. <|tool_call_start|>[trip(to='It\'s "R"\n\u00fc', days=3, warm=True, """
        r"""stops=["a", 'b',], more={'x': [None, -1.5e2], "y": ()}), now( )]<|tool_call_end|>"""
    )
    trip = {
        "to": 'It\'s "R"\nü',
        "days": 3,
        "warm": True,
        "stops": ["a", "b"],
        "more": {"x": [None, -150.0], "y": []},
    }
    assert read(text, cut) == ("I look.", [("trip", trip), ("now", {})])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"'\x41\u00e9\U0001F600'", "Aé😀"),
        (r"'\ud83d\ude00'", "😀"),
        (r"'a\d\\\t'", "a\\d\\\t"),
        ('"two\nlines"', "two\nlines"),
    ],
)
def test_escapes_mean_what_they_do_in_python(written: str, meant: str) -> None:
    assert read(mark(f"[now(a={written})]"))[1] == [("now", {"a": meant})]


def test_a_number_of_no_character_breaks_the_call_off() -> None:
    assert joined_calls(mark(r"[now(a='\uzzzz')]")) == [("now", '{"a": "')]


def joined_calls(text: str) -> list[tuple[str, str]]:
    """Calls with their arguments as they came, whole or not."""
    parser = AnswerParser(style=PYTHON, names=["now"])
    return joined([*parser.push(text), *parser.finish()])[2]


def test_json_and_a_call_without_a_list_are_read_as_well() -> None:
    assert read(mark("now(a=1, b=false)"))[1] == [("now", {"a": 1, "b": False})]
    assert read(mark('{"name": "now", "arguments": {"a": 1}}'))[1] == [("now", {"a": 1})]


@pytest.mark.parametrize(
    "text", [mark("[other(a=1)]"), mark("trip"), "[now()]", "<|tool_call_start|>[now"]
)
def test_what_is_no_call_of_an_offered_tool_is_content(text: str) -> None:
    assert read(text) == (text, [])


def accepts(text: str, offered: Offered) -> bool:
    options: dict[str, Any] = {"form": None, "reasons": False, "begun": False, "budget": None}
    grammar = constraint(TOKENIZERS[False], dialect_of(OLDER), offered, **options)
    assert grammar is not None
    ids = TOKENIZERS[False].encode(text)
    matcher = COMPILERS[False].matcher(grammar)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_a_forced_call_is_held_to_its_schema() -> None:
    offered = Offered(TOOLS, "required")
    for right in (
        '[trip(to="Rome")]',
        '[trip(to="Rome", days=2, warm=true, stops=["a", "b"])]',
        '[trip(to="Rome", stops=[])]',
        "[now()]",
        '[now(a=1, b={"c": null})]',
    ):
        assert accepts(mark(right), offered), right
        assert read(mark(right))[1], right
    for wrong in (
        '[trip(to="rome")]',
        "[trip(days=2)]",
        '[trip(to="Rome", days=0)]',
        '[trip(to="Rome", stops=["c"])]',
        '[trip(to="Rome", more=1)]',
        "[elsewhere()]",
        "now()",
    ):
        assert not accepts(mark(wrong), offered), wrong
    assert not accepts("Hello", offered)


def test_an_older_template_is_shown_calls_as_text() -> None:
    call = {"function": {"name": "trip", "arguments": {"to": "O'Hare", "warm": True}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    told, tools = for_template(dialect_of(OLDER), messages, [{"type": "function"}])
    written = mark("""[trip(to="O'Hare", warm=True)]""")
    assert OLDER.render([dict(m) for m in told], tools=tools).endswith(
        f"user:?;assistant:{written};tool:3;"
    )
    assert read(written)[1] == [("trip", {"to": "O'Hare", "warm": True})]


def test_a_newer_template_shows_them_itself() -> None:
    newer = ChatTemplate("<|tool_call_start|>{{ tool_calls }}", bos_token="", eos_token="")
    dialect = dialect_of(newer)
    assert (dialect.style, dialect.shows_calls) == (PYTHON, True)
