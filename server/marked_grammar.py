"""Calls whose arguments are marked one by one, as grammars; `marked_calls` reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from engine import Grammar
from engine.text.grammar import embedded
from engine.text.schemas import ANNOTATIONS, DEFINITIONS, refers_to_definitions
from engine.text.tokenizer import Tokenizer
from server.json_machine import BLANK
from server.lark import any_text, literal, mark
from server.marked_calls import QWEN, QWEN_NAME, Marks, referred, taken

LINE = literal("\n")
# What an object's schema may say for its arguments to be written out in order.
OBJECT_KEYS = {"type", "properties", "required", "additionalProperties", *ANNOTATIONS}
CHOOSING = {"enum", "const", "type"}
# A key that no schema names.
ANY_KEY = r"KEY: /[^<>\s][^<>\n]*/"

Schema = Mapping[str, Any]


class MarkedCalls:
    """Writes calls of a model with such `marks` into the `rules` of a grammar."""

    def __init__(self, tokenizer: Tokenizer, marks: Marks, rules: list[str]) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._rules = rules

    def call(self, label: str, name: str, schema: Schema) -> str | None:
        """What rule `label` has to be for a call of one tool; None if the schema says more than
        bare text can be held to."""
        arguments = self._arguments(label, schema)
        if arguments is None:
            return None
        if self._marks is QWEN:
            return f"{literal(f'{QWEN_NAME}{name}>')} {LINE} {arguments} {literal(QWEN.end)}"
        return f"{literal(name)} {LINE} {arguments}"

    def _arguments(self, label: str, schema: Schema) -> str | None:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        if not set(schema) <= OBJECT_KEYS or not set(required) <= set(properties):
            return None
        if not properties:
            return without_names(schema, "", lambda: self._any(label))
        parts = []
        for number, (key, part) in enumerate(properties.items()):
            rule = f"{label}_{number}"
            value = self._value(f"{rule}_value", part, schema)
            if value is None or not key or key.strip(BLANK) != key or set(key) & set("<>\n"):
                return None
            self._rules.append(f"{rule}: {self._before(literal(key))} {value}")
            parts.append(rule if key in required else f"{rule}?")
        return " ".join(parts)

    def _any(self, label: str) -> str:
        """Any arguments."""
        if ANY_KEY not in self._rules:
            self._rules.append(ANY_KEY)
        rule = f"{label}_any"
        self._rules.append(f"{rule}: {self._before('KEY')} {self._text(f'{rule}_value')}")
        return f"{rule}*"

    def _before(self, key: str) -> str:
        """What stands before a value."""
        marks = self._marks
        if marks is QWEN:
            return f"{literal(marks.key)} {key} {literal(marks.key_end)} {LINE}"
        begin, end, value = (
            mark(self._tokenizer, text) for text in (marks.key, marks.key_end, marks.value)
        )
        return f"{begin} {key} {end} {LINE} {value}"

    def _value(self, label: str, part: Any, root: Schema) -> str | None:
        """A value and what ends it, as its schema has it; None if that cannot be held to."""
        schema = followed(part, root)
        if schema is None:
            return None
        said = set(schema) - set(ANNOTATIONS)
        kinds, choices = taken(schema, root)
        # A line's end in front of it is none of the value, with Qwen's marks.
        before = f"{LINE} " if self._marks is QWEN else ""
        ends = f"{before}{mark(self._tokenizer, self._marks.value_end)} {LINE}"
        if choices and all(isinstance(choice, str) for choice in choices):
            plain = said <= CHOOSING and all(c == c.strip("\n") and "<" not in c for c in choices)
            return f"({' | '.join(map(literal, choices))}) {ends}" if plain else None
        if "string" not in kinds and kinds and not any(isinstance(c, str) for c in choices):
            document = alone(schema, root)
            return None if document is None else f"%json {embedded(document)} {ends}"
        if not said or (said == {"type"} and "string" in kinds) or _or_text(schema):
            return self._text(label)
        return None

    def _text(self, label: str) -> str:
        """Any text, up to what ends a value."""
        end, text = self._marks.value_end, any_text(self._rules)
        if self._tokenizer.mark_id(end) is None:
            self._rules.append(f"{label}[suffix={literal(end)}]: {text}")
            return f"{label} {LINE}"
        self._rules.append(f"{label}: {text}")
        return f"{label} {mark(self._tokenizer, end)} {LINE}"


def without_names(schema: Schema, none: str, anything: Callable[[], str]) -> str | None:
    """What an object is that names no properties: one of `none`, or `anything`; None if those that
    it may have are held to something."""
    others = schema.get("additionalProperties", True)
    if others is False:
        return none
    return anything() if others in (True, {}) else None


def followed(part: Any, root: Schema, hops: int = 8) -> Schema | None:
    """A property's schema, or what it alone refers to; None if there is no such thing."""
    while isinstance(part, dict) and set(part) - set(ANNOTATIONS) == {"$ref"} and hops:
        part, hops = referred(part["$ref"], root), hops - 1
    return {} if part is True else part if isinstance(part, dict) else None


def alone(schema: Schema, root: Schema) -> Grammar | None:
    """A property's schema as a document, with what it refers to; None if it refers elsewhere."""
    if not refers_to_definitions(dict(schema)):
        return None
    refers = '"$ref"' in json.dumps(schema)
    shared = {key: root[key] for key in DEFINITIONS if refers and key in root}
    return Grammar.json_schema({**schema, **shared})


def _or_text(schema: Schema) -> bool:
    """Whether one of a schema's alternatives is any text."""
    said = set(schema) - set(ANNOTATIONS)
    alternatives = schema.get("anyOf") if said == {"anyOf"} else None
    return any(
        isinstance(each, dict)
        and each.get("type") == "string"
        and set(each) - set(ANNOTATIONS) == {"type"}
        for each in alternatives or ()
    )
