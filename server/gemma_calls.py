"""Gemma 4's calls, to read and to write: `call:name{key:<|"|>text<|"|>,other:[1,true]}`, which is
JSON but for its keys and quotation marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from engine import Grammar
from engine.text.grammar import embedded
from engine.text.schemas import ANNOTATIONS
from engine.text.tokenizer import Tokenizer
from server.json_machine import (
    BLANK,
    MAX_DEPTH,
    NUMBER,
    Broken,
    Machine,
    Sink,
    enclosed,
    require,
    skip,
    string,
    until,
)
from server.lark import any_text, in_order, literal, mark
from server.marked_calls import Schemas, called, taken
from server.marked_grammar import CHOOSING, OBJECT_KEYS, Schema, alone, followed, without_names

HEAD, QUOTE = "call:", '<|"|>'
# What ends a value that is in no marks.
BARE_ENDS = ",}]"
ARRAY_KEYS = {"type", "items", *ANNOTATIONS}
# What the template writes for null as well.
WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"}
# Schemas that hold others are written out this deep, and all of an answer's up to so many
# characters: references may name each other over and over.
MAX_WRITTEN, MOST_CHARACTERS = 8, 100_000
ANY = (
    'gemma_any: gemma_text | %json {"type": ["number", "boolean", "null"]} | gemma_object '
    '| "[" (gemma_any ("," gemma_any)*)? "]"'
)
ANY_OBJECT = 'gemma_object: "{" (GEMMA_KEY ":" gemma_any ("," GEMMA_KEY ":" gemma_any)*)? "}"'
ANY_KEY = r"GEMMA_KEY: /[^<>{}\[\]:,\"\s]+/"


def gemma_call(char: str, schemas: Schemas, begin: Callable[[str], None], argue: Sink) -> Machine:
    """Reads a call of one of the tools in `schemas`: tells `begin` its name, and `argue` the
    arguments as JSON. Raises Broken if it is none."""
    for wanted in HEAD:
        require(char, wanted)
        char = yield
    yield from called(char, "{", schemas, begin)
    return (yield from _value("{", argue, 0))


def _value(char: str, sink: Sink, depth: int) -> Machine:
    if not char or depth > MAX_DEPTH:
        raise Broken(char)
    if char == "{":
        return (yield from enclosed(sink, "{}", "}", lambda c: _member(c, sink, depth + 1)))
    if char == "[":
        return (yield from enclosed(sink, "[]", "]", lambda c: _value(c, sink, depth + 1)))
    if char in '"<':
        return (yield from _text(char, sink))
    word = ""
    while char and char not in BARE_ENDS:
        word += char
        char = yield
    if not char:
        raise Broken(char)
    sink(_meaning(word.strip(BLANK)))
    return char


def _meaning(word: str) -> str:
    """A value without marks as JSON: a number or a word that it knows, or text."""
    if NUMBER.fullmatch(word):
        return word
    return WORDS.get(word) or json.dumps(word, ensure_ascii=False)


def _member(char: str, sink: Sink, depth: int) -> Machine:
    """A key and its value."""
    if char and char in '"<':
        char = yield from _text(char, sink)
    else:
        key = ""
        while char and char != ":":
            if char in "{}[],\n":
                raise Broken(char)
            key += char
            char = yield
        sink(json.dumps(key.strip(BLANK), ensure_ascii=False))
    require((yield from skip(char)), ":")
    sink(": ")
    return (yield from _value((yield from skip((yield))), sink, depth))


def _text(char: str, sink: Sink) -> Machine:
    """Text in Gemma's marks or in JSON's."""
    if char == '"':
        return (yield from string(sink))
    for wanted in QUOTE:
        require(char, wanted)
        char = yield
    sink('"')
    char, found = yield from until(
        char, (QUOTE,), lambda text: sink(json.dumps(text, ensure_ascii=False)[1:-1])
    )
    if not found:
        raise Broken("")
    sink('"')
    return char


class _TooMuch(Exception):
    """The rules have become longer than they may."""


class GemmaCalls:
    """Writes an answer's calls into the `rules` of its grammar."""

    def __init__(self, tokenizer: Tokenizer, rules: list[str]) -> None:
        self._quote = mark(tokenizer, QUOTE)
        self._closed = tokenizer.mark_id(QUOTE) is not None
        self._rules = rules
        self._written = 0

    def call(self, label: str, name: str, schema: Schema) -> str:
        """What rule `label` has to be for a call of one tool. Where a schema says more than can be
        written out its arguments are JSON."""
        before = len(self._rules)
        try:
            arguments = self._object(label, schema, schema, 0)
        except _TooMuch:
            arguments = None
        if arguments is None:
            # What all calls share stays.
            self._rules[before:] = [r for r in self._rules[before:] if not r.startswith(label)]
            arguments = f"%json {embedded(Grammar.json_schema(dict(schema)))}"
        return f"{literal(HEAD + name)} {arguments}"

    def _object(self, label: str, schema: Schema, root: Schema, depth: int) -> str | None:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        if not set(schema) <= OBJECT_KEYS or not set(required) <= set(properties):
            return None
        if not properties:
            return without_names(schema, '"{}"', lambda: self._any("object"))
        # In the order in which the template shows calls.
        names = sorted(properties, key=str.lower)
        members = []
        for number, key in enumerate(names):
            value = self._value(f"{label}_{number}", properties[key], root, depth + 1)
            if value is None or not key or set(key) & set('<>{}[]:,"' + BLANK):
                return None
            self._add(f"{label}_{number}: {literal(f'{key}:')} {value}")
            members.append((f"{label}_{number}", key in required))
        firsts = in_order(self._rules, label, members, ",")
        return f'"{{" {firsts} "}}"'

    def _value(self, label: str, part: Any, root: Schema, depth: int) -> str | None:
        """A value as its schema has it; None if that cannot be held to."""
        schema = followed(part, root)
        self._spend(len(label))
        if schema is None or depth > MAX_WRITTEN:
            return None
        if isinstance(named := schema.get("type"), list):
            one_each = [{**schema, "type": name} for name in named]
            return self._alternatives(label, one_each, root, depth)
        said = set(schema) - set(ANNOTATIONS)
        kinds, choices = taken(schema, root)
        if not said:
            return self._any("any")
        if choices:
            words = all(isinstance(choice, str) and "<" not in choice for choice in choices)
            if said <= CHOOSING and words:
                return f"{self._quote} ({' | '.join(map(literal, choices))}) {self._quote}"
        elif said == {"type"} and kinds == {"string"}:
            return self._any("text")
        elif schema.get("type") == "object":
            return self._object(label, schema, root, depth)
        elif schema.get("type") == "array":
            if not said <= ARRAY_KEYS:
                return None
            item = self._value(f"{label}_item", schema.get("items", {}), root, depth + 1)
            if item is None:
                return None
            self._add(f"{label}_item: {item}")
            return f'"[" ({label}_item ("," {label}_item)*)? "]"'
        elif said == {"anyOf"}:
            return self._alternatives(label, schema["anyOf"], root, depth)
        if (kinds or choices) and not kinds & {"string", "object", "array"} and plain(choices):
            document = alone(schema, root)
            return None if document is None else f"%json {embedded(document)}"
        return None

    def _add(self, rule: str) -> None:
        self._rules.append(rule)
        self._spend(len(rule))

    def _spend(self, characters: int) -> None:
        self._written += characters
        if self._written > MOST_CHARACTERS:
            raise _TooMuch

    def _alternatives(self, label: str, parts: Any, root: Schema, depth: int) -> str | None:
        found = []
        for number, part in enumerate(parts):
            value = self._value(f"{label}_or_{number}", part, root, depth + 1)
            if value is None:
                return None
            found.append(value)
        return f"({' | '.join(found)})" if found else None

    def _any(self, kind: str) -> str:
        """Anything of a kind: `any`, `object` or `text`."""
        if ANY not in self._rules:
            end = f" {self._quote}"
            text = any_text(self._rules)
            rule = f"gemma_words: {text}"
            if not self._closed:
                rule, end = f"gemma_words[suffix={literal(QUOTE)}]: {text}", ""
            self._rules += [ANY, ANY_OBJECT, ANY_KEY, rule]
            self._rules.append(f"gemma_text: {self._quote} gemma_words{end}")
        return f"gemma_{kind}"


def plain(choices: list[Any]) -> bool:
    """Whether none of the values is a text, or holds others."""
    return not any(isinstance(choice, (str, Mapping, list)) for choice in choices)
