"""Forced and strict calls of models that mark arguments: held to as the models write them, and read
as what the schema says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from engine import Grammar
from engine.text.chat import ChatTemplate
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from server.answer_parser import AnswerParser
from server.constraints import constraint
from server.dialect import HERMES, Dialect, dialect_of
from server.marked_calls import GLM, QWEN, Marks
from server.tools import FunctionTool, Offered
from tests.mock import EOS, byte_backend
from tests.server.test_answer_parser import joined

TOKENS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where to."},
        "days": {"type": "integer", "minimum": 1},
        "season": {"$ref": "#/$defs/season"},
        "stops": {"type": "array", "items": {"type": "string"}},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"season": {"enum": ["summer", "winter"]}},
}
ALL = {
    "city": 'St. "John\'s" <b>\n& more',
    "days": "3",
    "season": "winter",
    "stops": '["a", "b"]',
    "note": "two\nlines",
}
MEANT = ALL | {"days": 3, "stops": ["a", "b"]}
both = pytest.mark.parametrize("marks", [QWEN, GLM], ids=["qwen", "glm"])
tokens = pytest.mark.parametrize("whole", [False, True], ids=["spelled", "tokens"])


def tokenizer(*, whole: bool) -> Tokenizer:
    """Bytes, and the marks as tokens of their own."""
    backend = byte_backend()
    if whole:
        backend.add_tokens([AddedToken(m, special=False, normalized=False) for m in TOKENS])
    return Tokenizer(backend, eos_token="<eos>", eos_token_ids=[EOS])


TOKENIZERS = {whole: tokenizer(whole=whole) for whole in (False, True)}
COMPILERS = {
    whole: GrammarCompiler(lambda found=found: found, found.vocab_size)
    for whole, found in TOKENIZERS.items()
}


def grammar_of(marks: Marks, offered: Offered, *, whole: bool = False) -> Grammar:
    dialect = Dialect(HERMES, shows_tools=True, thinking=None, marks=marks)
    options: dict[str, Any] = {"form": None, "reasons": False, "begun": False, "budget": None}
    grammar = constraint(TOKENIZERS[whole], dialect, offered, **options)
    assert grammar is not None
    return grammar


def accepts(grammar: Grammar, text: str, *, whole: bool = False) -> bool:
    matcher = COMPILERS[whole].matcher(grammar)
    ids = TOKENIZERS[whole].encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(marks: Marks, values: dict[str, str], name: str = "trip") -> str:
    """A call as the family's template shows it."""
    if marks is QWEN:
        lines = [f"<parameter={key}>\n{value}\n</parameter>" for key, value in values.items()]
        return "\n".join(
            ["<tool_call>", f"<function={name}>", *lines, "</function>", "</tool_call>"]
        )
    lines = [
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in values.items()
    ]
    return "\n".join([f"<tool_call>{name}", *lines, "</tool_call>"])


def read(text: str, tools: list[FunctionTool]) -> list[tuple[str, Any]]:
    schemas = {tool.name: tool.parameters for tool in tools}
    parser = AnswerParser(style=HERMES, names=list(schemas), schemas=schemas)
    pieces = [*parser.push(text), *parser.finish()]
    return [(name, json.loads(arguments)) for name, arguments in joined(pieces)[2]]


def without(key: str) -> dict[str, str]:
    return {k: v for k, v in ALL.items() if k != key}


@both
@tokens
def test_a_forced_call_is_held_to_its_schema_in_the_models_own_marks(
    marks: Marks, *, whole: bool
) -> None:
    tool = FunctionTool("trip", "", TRIP)
    grammar = grammar_of(marks, Offered([tool, FunctionTool("stay")], "required"), whole=whole)
    text = written(marks, ALL)
    assert accepts(grammar, text, whole=whole)
    assert read(text, [tool]) == [("trip", MEANT)]
    few = {"city": "Rome", "days": "1"}
    assert accepts(grammar, written(marks, few), whole=whole)
    assert read(written(marks, few), [tool]) == [("trip", {"city": "Rome", "days": 1})]
    for wrong in (
        written(marks, without("city")),
        written(marks, ALL | {"days": "0"}),
        written(marks, ALL | {"days": "many"}),
        written(marks, ALL | {"season": "spring"}),
        written(marks, ALL | {"more": "1"}),
        written(marks, ALL, "elsewhere"),
        "<tool_call>\n" + json.dumps({"name": "trip", "arguments": MEANT}) + "\n</tool_call>",
        "Hello",
    ):
        assert not accepts(grammar, wrong, whole=whole), wrong


@both
def test_references_within_a_value_hold(marks: Marks) -> None:
    schema = {
        "type": "object",
        "properties": {"stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}}},
        "required": ["stops"],
        "$defs": {"stop": {"enum": [1, 2]}},
    }
    tool = FunctionTool("f", "", schema)
    grammar = grammar_of(marks, Offered([tool], "required"))
    text = written(marks, {"stops": "[1, 2]"}, "f")
    assert accepts(grammar, text)
    assert read(text, [tool]) == [("f", {"stops": [1, 2]})]
    assert not accepts(grammar, written(marks, {"stops": "[3]"}, "f"))


@both
@tokens
def test_tools_that_say_nothing_of_their_arguments_take_any(marks: Marks, *, whole: bool) -> None:
    tool = FunctionTool("stay")
    grammar = grammar_of(marks, Offered([tool], "required"), whole=whole)
    for values in ({}, {"a b": "x\ny", "n": "1"}):
        text = written(marks, values, "stay")
        assert accepts(grammar, text, whole=whole)
        assert read(text, [tool])[0][0] == "stay"


@both
def test_a_tool_without_arguments_has_none(marks: Marks) -> None:
    tool = FunctionTool("now", "", {"type": "object", "additionalProperties": False})
    grammar = grammar_of(marks, Offered([tool], "required"))
    assert accepts(grammar, written(marks, {}, "now"))
    assert not accepts(grammar, written(marks, {"a": "1"}, "now"))
    assert read(written(marks, {}, "now"), [tool]) == [("now", {})]


@both
@tokens
def test_strict_tools_may_be_called_but_only_rightly(marks: Marks, *, whole: bool) -> None:
    tool = FunctionTool("trip", "", TRIP, strict=True)
    grammar = grammar_of(marks, Offered([tool]), whole=whole)
    call, bad = written(marks, ALL), written(marks, without("days"))
    for text in ("It is warm.", call, f"Let me see.\n{call}", f"{call}\n{call}"):
        assert accepts(grammar, text, whole=whole), text
    assert not accepts(grammar, bad, whole=whole)


@both
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x"}}},
        {"type": "object", "properties": {"a": {"enum": ["x", 1]}}},
        {"type": "object", "properties": {"a": {"minimum": 3}}},
        {"type": "object", "properties": {"a b>": {"type": "string"}}},
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "minProperties": 1,
        },
        {"type": "object", "required": ["a"]},
    ],
)
def test_what_bare_text_cannot_be_held_to_stays_json(marks: Marks, schema: dict[str, Any]) -> None:
    """The schema is kept in any case."""
    grammar = grammar_of(marks, Offered([FunctionTool("f", "", schema)], "required"))
    key = next(iter(schema.get("properties", {"a": 1})))
    value = 1 if schema.get("minProperties") else 3 if "minimum" in str(schema) else "x"
    body = json.dumps({"name": "f", "arguments": {key: value}})
    assert accepts(grammar, f"<tool_call>\n{body}\n</tool_call>")
    assert not accepts(grammar, written(marks, {key: str(value)}, "f"))


@pytest.mark.parametrize(
    ("shown", "marks"),
    [
        ("<function={{ tools }}>\n<parameter=a>", QWEN),
        ("{{ tools }}<arg_key>a</arg_key>", GLM),
        ('{{ tools }}{"name": "f"}', None),
    ],
)
def test_a_template_shows_how_arguments_are_marked(shown: str, marks: Marks | None) -> None:
    template = ChatTemplate(f"<tool_call>{shown}</tool_call>", bos_token="", eos_token="")
    assert dialect_of(template).marks is marks
