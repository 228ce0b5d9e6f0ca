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

from server.json_machine import BLANK, MAX_DEPTH, Broken, Machine, Sink, require, until

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
# What ends a call of either kind, if what should have ended it before did not come.
CLOSE = "</tool_call>"


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
        _, char, found = yield from _text(char, (marks.key, marks.end, CLOSE))
    else:
        while char and char in BLANK:
            char = yield
        require(char, "<")
        char = yield
        found = marks.end if char == "/" else marks.key
        char = yield from _literal(char, found[1:], "<")
        begin(name)
    return (yield from _arguments(char, found, marks, schemas[name], argue))


def called(
    char: str, before: str, schemas: Schemas, begin: Callable[[str], None]
) -> Generator[None, str, None]:
    """Reads the name of one of the tools in `schemas` and what stands `before` its arguments, and
    tells `begin` the name. Raises Broken if it is none."""
    name = ""
    while char and char != before:
        name += char
        if not any(known.startswith(name) for known in schemas):
            raise Broken(char)
        char = yield
    if not char or name not in schemas:
        raise Broken(char)
    begin(name)


def _arguments(
    char: str, found: str, marks: Marks, schema: Mapping[str, Any], argue: Sink
) -> Machine:
    """Reads arguments behind the mark `found`."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    separator = "{"
    while found == marks.key:
        key, char, _ = yield from _text(char, (marks.key_end,))
        if marks.value:
            _, char, _ = yield from _text(char, (marks.value,))
        value, char, found = yield from _text(char, (marks.value_end,))
        if not found:
            return char
        key = key.strip(BLANK)
        # Without the lines' ends behind the mark and before the next.
        text = value.removeprefix("\n").removesuffix("\n") if marks is QWEN else value
        value = meaning(text, properties.get(key), schema)
        argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: {value}")
        separator = ", "
        _, char, found = yield from _text(char, (marks.key, marks.end, CLOSE))
    if found:
        argue("{}" if separator == "{" else "}")
    return char


def meaning(text: str, schema: Any, root: Mapping[str, Any] | None = None) -> str:
    """A bare value as JSON: what the schema takes, references in it to parts of `root`. Text where
    it takes text; else what it is as JSON, if it is."""
    kinds, choices = taken(schema, root or {})
    word = text.strip(BLANK).lower()
    if text not in choices:
        if "boolean" in kinds and word in ("true", "false"):
            return word
        if "null" in kinds and word in ("null", "none"):
            return "null"
        if "string" not in kinds:
            try:
                value = json.loads(text, parse_constant=_refuse)
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):
                return json.dumps(text, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def taken(
    schema: Any, root: Mapping[str, Any], depth: int = 0, seen: set[str] | None = None
) -> tuple[set[str], list[Any]]:
    """The types that a schema, a part of `root`, names anywhere, and the values. References that
    were `seen` are not followed again."""
    seen = set() if seen is None else seen
    kinds: set[str] = set()
    choices: list[Any] = []
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return kinds, choices
    named = schema.get("type")
    kinds |= {kind for kind in (named if isinstance(named, list) else [named]) if kind}
    values = schema.get("enum")
    choices += values if isinstance(values, list) else []
    choices += [schema["const"]] if "const" in schema else []
    inner = [each for key in ("anyOf", "oneOf", "allOf") for each in schema.get(key) or ()]
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        inner.append(referred(reference, root))
    for each in inner:
        more = taken(each, root, depth + 1, seen)
        kinds |= more[0]
        choices += more[1]
    return kinds, choices


def referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """The part of `root` that a `$ref` names; None if there is no such part."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    part: Any = root
    for step in reference.removeprefix("#/").split("/"):
        part = part.get(step) if isinstance(part, Mapping) else None
    return part


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
