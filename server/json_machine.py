"""Machines that read JSON one character at a time, strictly (RFC 8259)."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator

BLANK = " \t\r\n"
# JSON nested deeper than this is none that a tool takes.
MAX_DEPTH = 64
LITERALS = {"t": "true", "f": "false", "n": "null"}
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
ESCAPES = '"\\/bfnrtu'


class Broken(Exception):
    """What is read is not what it has to be; `char` is the first that does not fit, or what was
    read up to it and belongs to what follows."""

    def __init__(self, char: str) -> None:
        self.char = char


# Reads characters, and returns the first that it has not used; "" is the text's end.
Machine = Generator[None, str, str]
Sink = Callable[[str], None]


def require(char: str, wanted: str) -> None:
    if char != wanted:
        raise Broken(char)


def value(char: str, sink: Sink, depth: int = 0) -> Machine:
    """Any JSON value, strictly; every character of it goes to `sink`."""
    if not char or depth > MAX_DEPTH:
        raise Broken(char)
    if char == '"':
        return (yield from string(sink))
    if char == "{":
        return (yield from _members(sink, "}", depth))
    if char == "[":
        return (yield from _members(sink, "]", depth))
    if char in LITERALS:
        for wanted in LITERALS[char]:
            if char != wanted:
                raise Broken(char)
            sink(char)
            char = yield
        return char
    return (yield from _number(char, sink))


def _members(sink: Sink, end: str, depth: int) -> Machine:
    """What an object or a list holds."""
    sink("{" if end == "}" else "[")
    char = yield from _blank((yield), sink)
    first = True
    while char != end or not first:
        if end == "}":
            require(char, '"')
            char = yield from _blank((yield from string(sink)), sink)
            require(char, ":")
            sink(char)
            char = yield from _blank((yield), sink)
        char = yield from _blank((yield from value(char, sink, depth + 1)), sink)
        first = False
        if char == end:
            break
        require(char, ",")
        sink(char)
        char = yield from _blank((yield), sink)
    sink(end)
    return (yield)


def _blank(char: str, sink: Sink) -> Machine:
    while char and char in BLANK:
        sink(char)
        char = yield
    return char


def skip(char: str) -> Machine:
    """What follows blanks, which say nothing."""
    while char and char in BLANK:
        char = yield
    return char


def enclosed(
    sink: Sink,
    brackets: str,
    end: str,
    member: Callable[[str], Machine],
    *,
    trailing: bool = False,
) -> Machine:
    """What stands up to `end` between commas, each read by `member`, as a JSON value in `brackets`;
    the last comma may be `trailing`. Its first bracket has been read."""
    sink(brackets[0])
    char = yield from skip((yield))
    first = True
    while char != end:
        if not first:
            require(char, ",")
            char = yield from skip((yield))
            if trailing and char == end:
                break
            sink(", ")
        first = False
        char = yield from skip((yield from member(char)))
    sink(brackets[1])
    return (yield)


def string(sink: Sink) -> Machine:
    """The rest of a string whose first quotation mark has been read."""
    sink('"')
    while True:
        char = yield
        if not char or char < " ":
            raise Broken(char)
        if char == "\\":
            sink(char)
            char = yield
            if not char or char not in ESCAPES:
                raise Broken(char)
            sink(char)
            for _ in range(4 if char == "u" else 0):
                char = yield
                if not char or char not in "0123456789abcdefABCDEF":
                    raise Broken(char)
                sink(char)
            continue
        sink(char)
        if char == '"':
            return (yield)


def _number(char: str, sink: Sink) -> Machine:
    """A number, by JSON's grammar."""

    def digits(char: str) -> Machine:
        if not char or char not in "0123456789":
            raise Broken(char)
        while char and char in "0123456789":
            sink(char)
            char = yield
        return char

    if char == "-":
        sink(char)
        char = yield
    if char == "0":
        sink(char)
        char = yield
    else:
        char = yield from digits(char)
    if char == ".":
        sink(char)
        char = yield from digits((yield))
    if char and char in "eE":
        sink(char)
        char = yield
        if char and char in "+-":
            sink(char)
            char = yield
        char = yield from digits(char)
    return char


def until(char: str, marks: tuple[str, ...], show: Sink) -> Generator[None, str, tuple[str, str]]:
    """Show text up to one of some marks; then what follows it, and which it was ("": none)."""
    held = ""
    while char:
        held += char
        while held and not any(mark.startswith(held) for mark in marks):
            show(held[0])
            held = held[1:]
        char = yield
        if held in marks:
            return char, held
    if held:
        show(held)
    return "", ""
