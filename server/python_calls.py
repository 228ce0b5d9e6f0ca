"""Calls that look like Python's, as LFM2 writes them: `[name(key="text", other=[1, True])]`, one
or several in a list; both to read and to write."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from engine.text.grammar import embedded
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
)
from server.lark import in_order, literal
from server.marked_calls import Schemas, called
from server.marked_grammar import OBJECT_KEYS, Schema, alone, followed, without_names

WORDS = {"True": "true", "False": "false", "None": "null"}
WORDS |= {word: word for word in WORDS.values()}
# Brackets of lists, tuples and dictionaries; what ends a value that is no text.
PAIRS = {"[": "]", "(": ")", "{": "}"}
ENDS = ",)]}:"
# What may stand behind a backslash, and how many digits of a character's number.
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"'}
DIGITS = {"x": 2, "u": 4, "U": 8}
ANY_ARGUMENT = 'python_any: /[A-Za-z_][A-Za-z0-9_]*/ "=" %json {}'


def python_calls(char: str, schemas: Schemas, begin: Callable[[str], None], argue: Sink) -> Machine:
    """Reads calls of the tools in `schemas`, in a list or one without: tells `begin` each name, and
    `argue` its arguments as JSON. Raises Broken if they are none."""
    listed = char == "["
    if listed:
        char = yield from skip((yield))
    while True:
        char = yield from _call(char, schemas, begin, argue)
        if not listed:
            return char
        char = yield from skip(char)
        if char == "]":
            return (yield)
        require(char, ",")
        char = yield from skip((yield))


def _call(char: str, schemas: Schemas, begin: Callable[[str], None], argue: Sink) -> Machine:
    yield from called(char, "(", schemas, begin)
    return (yield from enclosed(argue, "{}", ")", lambda c: _argument(c, argue)))


def _argument(char: str, sink: Sink) -> Machine:
    key = ""
    while char and (char.isalnum() or char == "_"):
        key += char
        char = yield
    if not key:
        raise Broken(char)
    require((yield from skip(char)), "=")
    sink(f"{json.dumps(key)}: ")
    return (yield from _value((yield from skip((yield))), sink, 0))


def _value(char: str, sink: Sink, depth: int) -> Machine:
    if not char or depth > MAX_DEPTH:
        raise Broken(char)
    if char in "'\"":
        return (yield from _text(char, sink))
    if char in PAIRS:
        member = _entry if char == "{" else _value
        brackets = "{}" if char == "{" else "[]"

        def one(first: str) -> Machine:
            return member(first, sink, depth + 1)

        return (yield from enclosed(sink, brackets, PAIRS[char], one, trailing=True))
    word = ""
    while char and char not in ENDS:
        word += char
        char = yield
    if not char:
        raise Broken(char)
    word = word.strip(BLANK)
    if word not in WORDS and not NUMBER.fullmatch(word):
        raise Broken(char)
    sink(WORDS.get(word, word))
    return char


def _entry(char: str, sink: Sink, depth: int) -> Machine:
    """A dictionary's key and value."""
    if not char or char not in "'\"":
        raise Broken(char)
    require((yield from skip((yield from _text(char, sink)))), ":")
    sink(": ")
    return (yield from _value((yield from skip((yield))), sink, depth))


def _text(mark: str, sink: Sink) -> Machine:
    """The rest of a string that `mark` has begun, as JSON."""
    sink('"')
    while (char := (yield)) != mark:
        if not char:
            raise Broken(char)
        if char == "\\":
            sink((yield from _escaped()))
        else:
            sink(json.dumps(char, ensure_ascii=False)[1:-1])
    sink('"')
    return (yield)


def _escaped() -> Generator[None, str, str]:
    """What is meant behind a backslash, as JSON; one that means nothing stands for itself."""
    letter = yield
    if letter not in DIGITS:
        return json.dumps(ESCAPES.get(letter, f"\\{letter}"), ensure_ascii=False)[1:-1]
    code = last = ""
    for _ in range(DIGITS[letter]):
        last = yield
        code += last
    try:
        # ASCII: half of a pair is no character, but the two are one in JSON.
        return json.dumps(chr(int(code, 16)))[1:-1]
    except (ValueError, OverflowError):
        raise Broken(last) from None


def as_python(calls: Iterable[Mapping[str, Any]]) -> str:
    """A list of calls, whose `arguments` are objects, as the reader takes it."""
    written = []
    for call in calls:
        function = call["function"]
        arguments = ", ".join(f"{key}={value!r}" for key, value in function["arguments"].items())
        written.append(f"{function['name']}({arguments})")
    return f"[{', '.join(written)}]"


def python_call(rules: list[str], label: str, name: str, schema: Schema) -> str | None:
    """What rule `label` has to be for a call of one tool, a list of its own; None if the schema
    says more than arguments in a row can be held to. Values are JSON, which Python reads alike but
    for the words that the reader knows."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    if not set(schema) <= OBJECT_KEYS or not set(required) <= set(properties):
        return None
    members = []
    for number, (key, part) in enumerate(properties.items()):
        found = followed(part, schema)
        document = None if found is None else alone(found, schema)
        if document is None or not key.isidentifier() or not key.isascii():
            return None
        rules.append(f"{label}_{number}: {literal(f'{key}=')} %json {embedded(document)}")
        members.append((f"{label}_{number}", key in required))
    arguments: str | None = in_order(rules, label, members, ", ")
    if not properties:
        arguments = without_names(schema, "", lambda: '(python_any (", " python_any)*)?')
        if ANY_ARGUMENT not in rules:
            rules.append(ANY_ARGUMENT)
    if arguments is None:
        return None
    return f'{literal(f"[{name}(")} {arguments} ")]"'
