"""Grammars: what is accepted, and what is refused with its place."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
from llguidance import LLParserLimits

from engine.errors import InvalidRequest
from engine.text.grammar import KEPT, MAX_GRAMMAR_BYTES, GrammarCompiler
from engine.types import Grammar
from tests.mock import EOS, VOCAB, byte_tokenizer


def compiler(**limits: int) -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer, VOCAB, LLParserLimits(**limits) if limits else None)


COMPILER = compiler()


def matches(grammar: Grammar, text: str) -> bool:
    matcher = COMPILER.matcher(grammar)
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar.json_schema({"type": "integer"}), "17", "x"),
        (Grammar("regex", r"[a-c]{2,3}"), "abc", "abcd"),
        (Grammar("choice", '["yes", "no", "\\"quoted\\"", "größer"]'), '"quoted"', "maybe"),
        (Grammar("choice", '["größer"]'), "größer", "groesser"),
        (Grammar("lark", 'start: "a" NUM\nNUM: /[0-9]+/'), "a12", "12"),
        (Grammar("gbnf", 'root ::= "x" [0-9]+'), "x12", "x"),
    ],
    ids=["json_schema", "regex", "choice", "unicode choice", "lark", "gbnf"],
)
def test_every_notation(grammar: Grammar, good: str, bad: str) -> None:
    assert matches(grammar, good)
    assert not matches(grammar, bad)


def test_blanks_between_the_parts_of_a_json_text_are_bounded() -> None:
    grammar = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert matches(grammar, '{"a":1}')
    assert matches(grammar, '{"a": 1}')
    assert matches(grammar, '{\n    "a": 1\n}')
    assert not matches(grammar, '{  "a": 1}')
    assert not matches(grammar, '{\n\n"a": 1}')


@pytest.mark.parametrize(
    ("schema", "place", "names"),
    [
        ({"type": "strin"}, "at /type", "strin"),
        ({"properties": {"a": {"items": {"type": "objekt"}}}}, "/properties/a/items", "objekt"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "/properties/a", "not"),
        ({"anyOf": [{}, {"uniqueItems": True, "type": "array"}]}, "/anyOf/1", "uniqueItems"),
        ({"if": {}, "then": {}}, "at /", "if, then"),
        ({"$ref": "#/$defs/missing"}, "/$defs/missing", "does not exist"),
        ({"$ref": "http://example.com/x"}, "at /", "example.com"),
        ({"type": "string", "pattern": "(?=a)b"}, "at /", "look-ahead"),
        ({"type": "string", "minLength": -1}, "/minLength", "-1"),
        ({"oneOf": [{"type": "string"}, {"type": "string"}]}, "at /", "use anyOf"),
        (["no", "object"], "", "object"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_place_and_name(
    schema: Any, place: str, names: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        COMPILER.matcher(Grammar("json_schema", json.dumps(schema)))
    assert refused.value.param == "grammar"
    assert place in str(refused.value)
    assert names in str(refused.value)
    assert "<state>" not in str(refused.value)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[" * 100_000),
        Grammar("regex", "(a"),
        Grammar("choice", "[]"),
        Grammar("choice", '["a", ""]'),
        Grammar("choice", '{"a": 1}'),
        Grammar("lark", "start: missing"),
        Grammar("gbnf", "root ::= missing"),
        Grammar("gbnf", "???"),
        Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1)),
    ],
    ids=lambda grammar: f"{grammar.kind} {grammar.text[:20]}",
)
def test_a_broken_grammar_is_refused(grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be used: .+"):
        COMPILER.matcher(grammar)


def test_matchers_of_one_grammar_do_not_touch_each_other() -> None:
    grammar = Grammar("regex", "abc")
    first, second = COMPILER.matcher(grammar), COMPILER.matcher(grammar)
    assert first.consume_tokens(list(b"abc"))
    assert first.is_accepting()
    assert not second.is_accepting()


def test_only_the_last_grammars_are_kept() -> None:
    fresh = compiler()
    for number in range(KEPT + 10):
        fresh.matcher(Grammar("regex", f"a{{{number + 1}}}"))
    assert len(fresh._compiled) == KEPT


def test_a_grammar_too_large_for_the_limits_is_refused() -> None:
    small = compiler(max_grammar_size=10)
    with pytest.raises(InvalidRequest, match="cannot be used"):
        small.matcher(Grammar.json_schema({"properties": {c: {} for c in "abcdefgh"}}))


def test_a_model_without_an_end_cannot_follow_a_grammar() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token_ids = frozenset()
    with pytest.raises(InvalidRequest, match="names no token that ends"):
        GrammarCompiler(lambda: tokenizer, VOCAB).matcher(Grammar("regex", "a"))


def test_the_end_is_allowed_only_where_the_grammar_may_end() -> None:
    matcher = COMPILER.matcher(Grammar("regex", "ab?"))
    assert matcher.validate_tokens([EOS]) == 0
    matcher.consume_token(ord("a"))
    assert matcher.validate_tokens([EOS]) == 1
    assert matcher.validate_tokens([ord("b"), EOS]) == 2


@pytest.mark.parametrize("place", ["http://127.0.0.1:{port}/schema", "file:///proc/self/environ"])
def test_nothing_is_fetched_for_a_schema(place: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        named = place.format(port=listener.getsockname()[1])
        schema = {"$schema": named, "properties": {"a": {"$schema": named, "$id": named}}}
        assert COMPILER.matcher(Grammar.json_schema(schema))
        with pytest.raises(TimeoutError):
            listener.accept()


def test_many_choices_are_followed() -> None:
    words = [f"word {number}" for number in range(5000)]
    grammar = Grammar("choice", json.dumps(words))
    assert matches(grammar, "word 4711")
    assert not matches(grammar, "word 5000")


def test_what_is_too_large_to_be_followed_is_refused_before_it_is() -> None:
    small = compiler(step_max_items=20)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lark = "start: " + " | ".join(f'"{a}" "{a}" NUM' for a in letters) + "\nNUM: /[0-9]+/"
    with pytest.raises(InvalidRequest, match="Too many items"):
        small.matcher(Grammar("lark", lark))


def test_whoever_has_a_grammar_does_not_wait_for_anothers() -> None:
    fresh = compiler()
    known = Grammar("regex", "a")
    fresh.matcher(known)
    large = {"oneOf": [{"const": n} for n in range(128)], "properties": {}}
    slow = Grammar.json_schema({"anyOf": [large] * 40})
    begun = threading.Thread(target=fresh.matcher, args=(slow,))
    begun.start()
    begin = time.perf_counter()
    fresh.matcher(known)
    waited = time.perf_counter() - begin
    running = begun.is_alive()
    begun.join()
    assert waited < 0.2 or not running
