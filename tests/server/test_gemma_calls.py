"""Gemma 4's reasoning and calls: read as JSON, and held to schemas in the model's own form."""

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
from server.answering import Wishes
from server.constraints import constraint
from server.dialect import GEMMA4, Dialect, dialect_of
from server.tools import FunctionTool, Offered
from tests.mock import EOS, byte_backend
from tests.server.test_answer_parser import joined

MARKS = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
TEMPLATE = ChatTemplate(
    "{% if enable_thinking %}<|think|>{% endif %}{% for tool in tools or [] %}<|tool>{% endfor %}"
    "{% for m in messages %}<|turn>{{ m.role }}\n<|tool_call>call:<tool_call|>{% endfor %}"
    "<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}",
    bos_token="",
    eos_token="",
)
TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "to": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "season": {"$ref": "#/$defs/season"},
        "stops": {"type": "array", "items": {"type": "string"}},
        "hotel": {"type": "object", "properties": {"stars": {"type": "integer"}}},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["to", "days"],
    "additionalProperties": False,
    "$defs": {"season": {"enum": ["summer", "winter"]}},
}
TOOLS = [FunctionTool("trip", "", TRIP), FunctionTool("trips", "", {"type": "object"})]
FULL = (
    '<|tool_call>call:trip{days:3,hotel:{stars:4},note:null,season:<|"|>winter<|"|>,'
    'stops:[<|"|>a<|"|>,<|"|>b, c<|"|>],to:<|"|>St. "John\'s" {x}\n<|"|>}<tool_call|>'
)
MEANT = {
    "days": 3,
    "hotel": {"stars": 4},
    "note": None,
    "season": "winter",
    "stops": ["a", "b, c"],
    "to": 'St. "John\'s" {x}\n',
}
tokens = pytest.mark.parametrize("whole", [False, True], ids=["spelled", "tokens"])


def tokenizer(*, whole: bool) -> Tokenizer:
    """Bytes, and the marks as special tokens."""
    backend = byte_backend()
    if whole:
        backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS])
    return Tokenizer(backend, eos_token="<eos>", eos_token_ids=[EOS])


TOKENIZERS = {whole: tokenizer(whole=whole) for whole in (False, True)}
COMPILERS = {
    whole: GrammarCompiler(lambda found=found: found, found.vocab_size)
    for whole, found in TOKENIZERS.items()
}
DIALECT = dialect_of(TEMPLATE)


def read(text: str, *, cut: int = 1, **options: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls of an answer that comes in pieces."""
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    parser = AnswerParser(style=GEMMA4, names=list(schemas), schemas=schemas, **options)
    pieces = [p for at in range(0, len(text), cut) for p in parser.push(text[at : at + cut])]
    reasoning, content, calls = joined([*pieces, *parser.finish()])
    return reasoning, content, [(name, json.loads(arguments)) for name, arguments in calls]


def grammar_of(offered: Offered, *, whole: bool, **options: Any) -> Grammar:
    plain: dict[str, Any] = {"form": None, "reasons": False, "begun": False, "budget": None}
    grammar = constraint(TOKENIZERS[whole], DIALECT, offered, **(plain | options))
    assert grammar is not None
    return grammar


def accepts(grammar: Grammar, text: str, *, whole: bool) -> bool:
    matcher = COMPILERS[whole].matcher(grammar)
    ids = TOKENIZERS[whole].encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_the_template_is_known_by_its_marks() -> None:
    assert (
        Dialect(GEMMA4, shows_tools=True, thinking=("<|channel>thought", "<channel|>")) == DIALECT
    )


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_a_call_is_read_as_json_however_it_is_cut(cut: int) -> None:
    assert read(FULL, cut=cut) == ("", "", [("trip", MEANT)])
    several = f"Let me see.{FULL}<|tool_call>call:trips{{}}<tool_call|>"
    assert read(several, cut=cut) == ("", "Let me see.", [("trip", MEANT), ("trips", {})])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"to": "Rome", "days": 2}', {"to": "Rome", "days": 2}),
        ('{ <|"|>to<|"|> : <|"|>Rome<|"|> , days: 2 }', {"to": "Rome", "days": 2}),
        ("{to:Rome,warm:true,cost:-1.5e3}", {"to": "Rome", "warm": True, "cost": -1500.0}),
        ("{to:NaN,list:[]}", {"to": "NaN", "list": []}),
        ('{a:{b:[{c:<|"|><|x<|"|>}]}}', {"a": {"b": [{"c": "<|x"}]}}),
    ],
)
def test_what_is_nearly_the_form_is_read_as_well(written: str, meant: dict[str, Any]) -> None:
    assert read(f"<|tool_call>call:trips{written}<tool_call|>")[2] == [("trips", meant)]


@pytest.mark.parametrize(
    "text",
    ["<|tool_call>call:other{a:1}<tool_call|>", "<|tool_call>trip{}", "<|tool_call>call:trip"],
)
def test_what_is_no_call_of_an_offered_tool_is_content(text: str) -> None:
    assert read(text) == ("", text, [])


def test_reasoning_stands_in_its_channel() -> None:
    thinking = DIALECT.thinking
    text = f"<|channel>thought\nLet me\nthink.\n<channel|>Here: {FULL}"
    assert read(text, thinking=thinking) == ("Let me\nthink.", "Here:", [("trip", MEANT)])
    assert read("<|channel>thought\n<channel|>Yes.", thinking=thinking)[:2] == ("", "Yes.")


@tokens
def test_a_forced_call_is_held_to_its_schema(*, whole: bool) -> None:
    grammar = grammar_of(Offered(TOOLS, "required"), whole=whole)
    few = '<|tool_call>call:trip{days:1,to:<|"|>Rome<|"|>}<tool_call|>'
    assert accepts(grammar, FULL, whole=whole)
    assert accepts(grammar, few, whole=whole)
    assert accepts(grammar, few + FULL, whole=whole)
    free = '<|tool_call>call:trips{x:[1,<|"|>a<|"|>],y:{z:null}}<tool_call|>'
    assert accepts(grammar, free, whole=whole)
    for wrong in (
        FULL.replace("days:3,", ""),
        FULL.replace("days:3", "days:0"),
        FULL.replace("days:3", 'days:<|"|>3<|"|>'),
        FULL.replace("winter", "spring"),
        FULL.replace("{days", "{more:1,days"),
        FULL.replace("stars:4", "stars:<"),
        FULL.replace("call:trip", "call:elsewhere"),
        "Hello",
    ):
        assert not accepts(grammar, wrong, whole=whole), wrong


@tokens
def test_a_schema_that_says_more_is_held_to_as_json(*, whole: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    tool = FunctionTool("trip", "", schema)
    grammar = grammar_of(Offered([tool], "required"), whole=whole)
    right = '<|tool_call>call:trip{"code": "ABC"}<tool_call|>'
    assert accepts(grammar, right, whole=whole)
    assert not accepts(grammar, right.replace("ABC", "abc"), whole=whole)
    assert read(right)[2] == [("trip", {"code": "ABC"})]


@tokens
def test_reasoning_may_come_before_a_forced_call(*, whole: bool) -> None:
    grammar = grammar_of(Offered(TOOLS, "required"), whole=whole, reasons=True)
    assert accepts(grammar, f"<|channel>thought\nHm.\n<channel|>{FULL}", whole=whole)
    assert accepts(grammar, FULL, whole=whole)
    assert not accepts(grammar, "<|channel>thought\nHm.\n<channel|>Hello", whole=whole)


def test_an_effort_switches_reasoning_on_and_off() -> None:
    for effort, on in (("high", True), ("none", False)):
        prompt = TEMPLATE.render(
            [{"role": "user", "content": "?"}], variables=Wishes(effort=effort).for_template
        )
        assert prompt.startswith("<|think|>") is on
    assert "enable_thinking" not in Wishes().for_template
