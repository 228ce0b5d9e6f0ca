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
from server.answering import Wishes, encode_chat, prepare_answer
from server.constraints import constraint
from server.dialect import GEMMA4, Dialect, dialect_of
from server.tools import FunctionTool, Offered
from tests.mock import EOS, byte_backend, mock_engine
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


def tokenizer(*, whole: bool, template: str | None = None) -> Tokenizer:
    """Bytes, and the marks as special tokens."""
    backend = byte_backend()
    if whole:
        backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS])
    known = {"eos_token": "<eos>", "eos_token_ids": [EOS], "chat_template": template}
    return Tokenizer(backend, **known)


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
        ("{to:NaN,list:[],none:None}", {"to": "NaN", "list": [], "none": None}),
        ('{a:{b:[{c:<|"|><|x<|"|>}]}}', {"a": {"b": [{"c": "<|x"}]}}),
    ],
)
def test_what_is_nearly_the_form_is_read_as_well(written: str, meant: dict[str, Any]) -> None:
    assert read(f"<|tool_call>call:trips{written}<tool_call|>")[2] == [("trips", meant)]


def test_numbers_stay_as_they_are_written() -> None:
    parser = AnswerParser(style=GEMMA4, names=["trips"])
    text = "<|tool_call>call:trips{a:1e999,b:0.1000000000000000055511,c:-0}<tool_call|>"
    (call,) = joined([*parser.push(text), *parser.finish()])[2]
    assert call == ("trips", '{"a": 1e999, "b": 0.1000000000000000055511, "c": -0}')


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


@pytest.mark.parametrize("style", [GEMMA4, None])
def test_more_of_it_may_stand_anywhere_and_stray_marks_say_nothing(style: Any) -> None:
    text = (
        "<|channel>thought\nOne.<channel|><|channel>thought\n<channel|>Hello<channel|> you"
        " <|channel>thought\nTwo.<channel|>!<|channel>thought\nThree"
    )
    thinking = DIALECT.thinking
    parser = AnswerParser(style=style, names=["trip"], thinking=thinking, channels=thinking)
    reasoning, content, calls = joined([*parser.push(text), *parser.finish()])
    assert (reasoning, content, calls) == ("One.\nTwo.\nThree", "Hello you !", [])


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


def nested(parts: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": parts, "additionalProperties": False, **more}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            '{"a": 1}',
            '{a:<|"|>x<|"|>}',
        ),
        (nested({"a": {"type": ["string", "null"]}}), '{a:<|"|>x<|"|>}', "{a:1}"),
        (nested({"a": {"type": ["string", "null"]}}), "{a:null}", "{a:true}"),
        (nested({"a": {"enum": [1, 2]}}), "{a:2}", "{a:3}"),
        (nested({"a\t": {"type": "integer"}}), '{"a\\t": 2}', "{a\t:2}"),
    ],
)
def test_what_is_allowed_is_what_the_schema_allows(
    schema: dict[str, Any], right: str, wrong: str
) -> None:
    offered = Offered([FunctionTool("trip", "", schema)], "required")
    grammar = grammar_of(offered, whole=False)
    call = "<|tool_call>call:trip{}<tool_call|>"
    assert accepts(grammar, call.replace("{}", right), whole=False)
    assert not accepts(grammar, call.replace("{}", wrong), whole=False)


@pytest.mark.parametrize("kind", ["properties", "anyOf"])
def test_references_that_multiply_are_left_to_json(kind: str) -> None:
    """Ten of each level in the one above: written out they would be a hundred million."""
    levels: dict[str, Any] = {"L8": {"type": "integer"}}
    for n in range(8):
        parts = [{"$ref": f"#/$defs/L{n + 1}"}] * 10
        below = nested({f"k{i}": part for i, part in enumerate(parts)})
        levels[f"L{n}"] = below if kind == "properties" else {"anyOf": parts}
    root = nested({"a": {"$ref": "#/$defs/L0"}}, **{"$defs": levels})
    grammar = grammar_of(Offered([FunctionTool("trip", "", root)], "required"), whole=False)
    assert len(grammar.text) < 20_000
    assert '"call:trip" %json' in grammar.text


def test_definitions_that_a_value_does_not_need_are_not_written_with_it() -> None:
    definitions = {
        f"D{n}": nested({f"x{m}": {"type": "integer"} for m in range(9)}) for n in range(9)
    }
    parts = {name: {"$ref": f"#/$defs/{name}"} for name in definitions}
    tool = FunctionTool("trip", "", nested(parts, **{"$defs": definitions}))
    grammar = grammar_of(Offered([tool], "required"), whole=False)
    assert '"call:trip" "{"' in grammar.text
    assert len(grammar.text) < 30_000


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


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, None), ({"thinking": True}, True), ({"x": 1}, None)]
)
async def test_granite_is_not_told_to_put_its_answer_in_tags(
    variables: dict[str, Any], expected: bool | None
) -> None:
    source = "<response></think>{{ thinking }}{% for m in messages %}{{ m.content }}{% endfor %}"
    engine, _ = mock_engine(chat_template=source)
    async with engine:
        made = await prepare_answer(
            engine, [{"role": "user", "content": "?"}], Wishes(effort="high", variables=variables)
        )
        text = engine.parts.tokenizer.decode(made.ids)
    assert text == f"<response></think>{'' if expected is None else expected}?"


async def test_a_turn_is_opened_where_the_template_leaves_it_closed() -> None:
    source = "{% for m in messages %}{{ m.content }}<turn|>{{ '\\n' }}{% endfor %}"
    engine, _ = mock_engine(chat_template=source)
    async with engine:
        _, ids = await encode_chat(engine, [{"role": "assistant", "content": "I look."}])
        text = engine.parts.tokenizer.decode(ids)
    assert text == "I look.<turn|>\n<|turn>model\n"


async def test_channels_are_found_where_their_marks_are_special_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether or not tools or reasoning were asked for."""
    source = "{# <|tool_call> #}<|channel>thought{{ messages[0].content }}<channel|>"
    known = tokenizer(whole=True, template=source)
    monkeypatch.setattr("tests.mock.byte_tokenizer", lambda *_: known)
    engine, _ = mock_engine()
    async with engine:
        made = await prepare_answer(engine, [{"role": "user", "content": "?"}], Wishes())
    assert made.marks
    assert made.parser is not None
    parser = made.parser()
    text = "a<|channel>thought\nb<channel|>c"
    assert joined([*parser.push(text), *parser.finish()])[:2] == ("b", "ac")
