"""Calls whose arguments are marked one by one, instead of being JSON.

GLM-4.5 and after write a name, then `<arg_key>` and `<arg_value>`, up to `</tool_call>`;
Qwen3-Coder and Qwen 3.5 `<function=name>`, then `<parameter=key>`, up to `</function>`. Values are
bare text, whose meaning the tool's schema decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from server.json_machine import BLANK, Broken, Machine, Sink, require, until

Schemas = Mapping[str, Mapping[str, Any]]
Text = Generator[None, str, tuple[str, str, str]]


@dataclass(frozen=True)
class Marks:
    """What stands before an argument, behind its key, before and behind its value, and behind the
    last one."""

    key: str
    key_end: str
    value: str
    value_end: str
    end: str


GLM = Marks("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")
QWEN = Marks("<parameter=", ">", "", "</parameter>", "</function>")
QWEN_NAME = "<function="


def marked_call(char: str, schemas: Schemas, begin: Callable[[str], None], argue: Sink) -> Machine:
    """Reads a call of one of the tools in `schemas`: tells `begin` its name, and `argue` the
    arguments as JSON, each once it is whole. Raises Broken if it is none."""
    marks = QWEN if char == "<" else GLM
    if marks is QWEN:
        char = yield from _literal(char, QWEN_NAME)
    name = ""
    while char and any(known.startswith(name + char) for known in schemas):
        name += char
        char = yield
    if name not in schemas:
        raise Broken(char)
    if marks is QWEN:
        char = yield from _literal(char, ">")
        begin(name)
        _, char, found = yield from _text(char, (marks.key, marks.end))
    else:
        while char and char in BLANK:
            char = yield
        require(char, "<")
        char = yield
        found = marks.end if char == "/" else marks.key
        char = yield from _literal(char, found[1:], "<")
        begin(name)
    return (yield from _arguments(char, found, marks, schemas[name], argue))


def _arguments(
    char: str, found: str, marks: Marks, schema: Mapping[str, Any], argue: Sink
) -> Machine:
    """Reads arguments behind the mark `found`."""
    properties = schema.get("properties")
    separator = "{"
    while found == marks.key:
        key, char, _ = yield from _text(char, (marks.key_end,))
        if marks.value:
            _, char, _ = yield from _text(char, (marks.value,))
        value, char, found = yield from _text(char, (marks.value_end,))
        if not found:
            return char
        key = key.strip(BLANK)
        kind = properties.get(key) if isinstance(properties, dict) else None
        # Without the lines' ends behind the mark and before the next.
        text = value.removeprefix("\n").removesuffix("\n") if marks is QWEN else value
        argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: {meaning(text, kind)}")
        separator = ", "
        _, char, found = yield from _text(char, (marks.key, marks.end))
    if found:
        argue("{}" if separator == "{" else "}")
    return char


def meaning(text: str, schema: Any) -> str:
    """A bare value as JSON: text where the schema takes text, else what it is as JSON, if it is."""
    schema = schema if isinstance(schema, dict) else {}
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    choices = schema.get("enum")
    if text in (choices if isinstance(choices, list) else ()):
        return json.dumps(text, ensure_ascii=False)
    if "string" in kinds and not (text == "null" and "null" in kinds):
        return json.dumps(text, ensure_ascii=False)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip(BLANK)


def _text(char: str, marks: tuple[str, ...]) -> Text:
    """Text up to one of the marks, what follows it, and which it was ("": the text's end)."""
    parts: list[str] = []
    char, found = yield from until(char, marks, parts.append)
    return "".join(parts), char, found


def _literal(char: str, wanted: str, seen: str = "") -> Machine:
    """Reads `wanted`. What is Broken otherwise is all that was read of it, `seen` before it."""
    for each in wanted:
        if char != each:
            raise Broken(seen + char)
        seen += char
        char = yield
    return char
