"""Grammars of whole answers: reasoning, calls in every style, and forms."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from engine import Grammar, InvalidRequest
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from server.answer_parser import AnswerParser, Style
from server.constraints import constraint
from server.dialect import GEMMA, GENERIC, HERMES, LLAMA, MISTRAL, Dialect
from server.tools import FunctionTool, Offered
from tests.mock import EOS, byte_backend
from tests.server.test_answer_parser import joined

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]")
PLACE = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}
WEATHER = FunctionTool("get_weather", "", PLACE)
STRICT = FunctionTool("get_weather", "", PLACE, strict=True)
FREE = FunctionTool("f")
GOOD = '{"city": "Rome"}'
STYLES = [HERMES, LLAMA, MISTRAL, GEMMA, GENERIC]


def tokenizer(*, marked: bool) -> Tokenizer:
    """Bytes, and a token of its own for each mark if there are any."""
    backend = byte_backend()
    if marked:
        backend.add_tokens([AddedToken(m, special=False, normalized=False) for m in MARKS])
    return Tokenizer(backend, eos_token="<eos>", eos_token_ids=[EOS])


TOKENIZERS = {marked: tokenizer(marked=marked) for marked in (False, True)}
COMPILERS = {
    marked: GrammarCompiler(lambda found=found: found, found.vocab_size)
    for marked, found in TOKENIZERS.items()
}


def accepts(grammar: Grammar | None, text: str, *, marked: bool = False) -> bool:
    assert grammar is not None
    matcher = COMPILERS[marked].matcher(grammar)
    ids = TOKENIZERS[marked].encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def of(
    style: Style, offered: Offered | None, *, marked: bool = False, **more: Any
) -> Grammar | None:
    options = {"form": None, "reasons": False, "begun": False, "budget": None} | more
    dialect = Dialect(style, shows_tools=True, thinking=("<think>", "</think>"))
    return constraint(TOKENIZERS[marked], dialect, offered, **options)


def written(style: Style, arguments: str, name: str = "get_weather") -> str:
    """A call as a grammar has it written."""
    if style is LLAMA:
        return f'{{"name": "{name}", "parameters": {arguments}}}'
    if style is MISTRAL:
        return f"[TOOL_CALLS]{name}[ARGS]{arguments}"
    body = f'{{"name": "{name}", "arguments": {arguments}}}'
    return f"{style.begins[0]}\n{body}\n{style.end}"


@pytest.mark.parametrize("marked", [False, True], ids=["spelled", "tokens"])
@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_a_forced_call_matches_its_schema_and_is_found(style: Style, marked: bool) -> None:
    grammar = of(style, Offered([WEATHER, FREE], "required"), marked=marked)
    text = written(style, GOOD)
    assert accepts(grammar, text, marked=marked)
    assert joined(AnswerParser(style=style, names=["get_weather"]).push(text + " "))[2] == [
        ("get_weather", GOOD)
    ]
    assert accepts(grammar, written(style, '{"any": [1]}', "f"), marked=marked)
    for wrong in (
        written(style, '{"city": "Bonn"}'),
        written(style, "{}"),
        written(style, GOOD, "g"),
        "Hello",
        "",
    ):
        assert not accepts(grammar, wrong, marked=marked)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_several_calls_where_they_are_allowed(style: Style) -> None:
    between = {"llama3": "; ", "mistral": ""}.get(style.name, "\n")
    two = between.join([written(style, GOOD), written(style, GOOD)])
    assert accepts(of(style, Offered([WEATHER], "required")), two)
    assert not accepts(of(style, Offered([WEATHER], "required", parallel=False)), two)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_a_named_choice_leaves_one_tool(style: Style) -> None:
    grammar = of(style, Offered([WEATHER, FREE], "f"))
    assert accepts(grammar, written(style, "{}", "f"))
    assert not accepts(grammar, written(style, GOOD))


@pytest.mark.parametrize("marked", [False, True], ids=["spelled", "tokens"])
@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_strict_tools_may_be_called_but_only_rightly(style: Style, marked: bool) -> None:
    grammar = of(style, Offered([STRICT, FREE]), marked=marked)
    assert accepts(grammar, "It is warm < 3, I think.", marked=marked)
    assert accepts(grammar, written(style, GOOD), marked=marked)
    assert not accepts(grammar, written(style, '{"city": 1}'), marked=marked)
    assert accepts(grammar, written(style, '{"x": 1}', "f"), marked=marked)
    if style is not LLAMA:
        assert accepts(grammar, f"Let me see. {written(style, GOOD)} Done.", marked=marked)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_a_form_may_begin_like_a_call(style: Style) -> None:
    form = Grammar.json_schema(
        {"type": "object", "properties": {"name": {"type": "string"}, "z": {"type": "string"}}}
    )
    grammar = of(style, Offered([STRICT, FREE]), form=form)
    for text in ('{"z": "x"}', '{"name": "Bob"}', written(style, GOOD)):
        assert accepts(grammar, text)
    assert not accepts(grammar, written(style, '{"city": 1}'))


def test_what_asks_for_nothing_is_free() -> None:
    assert of(HERMES, None) is None
    assert of(HERMES, Offered([WEATHER])) is None
    assert of(HERMES, Offered([STRICT], "none")) is None
    assert of(HERMES, None, reasons=True) is None


def test_a_form_alone_stays_as_it_is() -> None:
    form = Grammar("regex", "a+")
    assert of(HERMES, Offered([WEATHER]), form=form) is form


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Grammar.json_schema(PLACE), GOOD, '{"city": "Bonn"}'),
        (Grammar("regex", "a/b+"), "a/bb", "ab"),
        (Grammar("choice", '["yes", "no"]'), "yes", "maybe"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_form_beside_strict_tools_and_after_reasoning(form: Grammar, good: str, bad: str) -> None:
    beside = of(HERMES, Offered([STRICT]), form=form)
    assert accepts(beside, good)
    assert accepts(beside, written(HERMES, GOOD))
    assert not accepts(beside, bad)
    for marked in (False, True):
        after = of(HERMES, None, form=form, reasons=True, marked=marked)
        assert accepts(after, f"<think>hm {{ < hm</think>{good}", marked=marked)
        assert accepts(after, good, marked=marked)
        assert not accepts(after, f"<think>hm</think>{bad}", marked=marked)
        begun = of(HERMES, None, form=form, reasons=True, begun=True, marked=marked)
        assert accepts(begun, f"hm</think>{good}", marked=marked)


def test_reasoning_stops_at_its_budget() -> None:
    grammar = of(HERMES, None, reasons=True, begun=True, budget=5, marked=True)
    assert accepts(grammar, "1234</think>any text", marked=True)
    assert accepts(grammar, "12345</think>any text", marked=True)
    assert not accepts(grammar, "1234567</think>any text", marked=True)
    forced = of(HERMES, Offered([WEATHER], "required"), reasons=True, budget=5, marked=True)
    assert accepts(forced, f"<think>12</think>{written(HERMES, GOOD)}", marked=True)


def test_a_budget_needs_a_token_that_ends_reasoning() -> None:
    with pytest.raises(InvalidRequest, match="cannot be limited"):
        of(HERMES, None, reasons=True, budget=5)


def test_a_grammar_of_ones_own_cannot_be_combined() -> None:
    with pytest.raises(InvalidRequest, match="cannot be part of a larger one"):
        of(HERMES, Offered([STRICT]), form=Grammar("lark", 'start: "a"'))


def test_schemas_keep_their_references_within_a_call() -> None:
    recursive = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
        "additionalProperties": False,
    }
    grammar = of(HERMES, Offered([FunctionTool("f", "", recursive)], "f"))
    assert accepts(grammar, written(HERMES, json.dumps({"next": {"next": None}}), "f"))
    assert not accepts(grammar, written(HERMES, json.dumps({"next": {"x": None}}), "f"))
