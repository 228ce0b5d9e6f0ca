"""An answer's text taken apart while it streams: reasoning, content, and calls of tools.

One machine that reads characters, so that nothing depends on how the text was cut into deltas.
What looks like a call but is none (no JSON, or a tool that was not offered) is content.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from server.json_machine import BLANK, Broken, Machine, Sink, require, string, until, value
from server.marked_calls import Schemas

ARGUMENTS = ("arguments", "parameters")
# Reads a call of one of the tools in the schemas, tells the first function its name and the second
# its arguments as JSON, and raises Broken if it is none.
Reader = Callable[[str, Schemas, Callable[[str], None], Sink], Machine]


class Reasoning(msgspec.Struct, frozen=True):
    """Text of the reasoning before the answer."""

    text: str


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class CallBegin(msgspec.Struct, frozen=True):
    """A call of a tool begins; calls are counted from 0."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments, which are JSON once joined."""

    index: int
    text: str


Piece = Reasoning | Content | CallBegin | CallArguments


@dataclass(frozen=True)
class Style:
    """How a family of models writes calls: what announces them and what follows, either of which
    may be missing; and whether JSON at an answer's very beginning is one. `named` says that a call
    may be its name, then its arguments, with one of the `parts` between."""

    name: str
    begins: tuple[str, ...]
    end: str = ""
    leading: bool = False
    named: bool = False
    parts: tuple[str, ...] = ()
    reader: Reader | None = None
    """What reads a call that is no JSON."""
    lists: bool = False
    """Whether it reads lists of calls as well."""
    special: bool = False
    """Whether what announces calls is a special token, which text does not show otherwise."""


def neighbours_joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of which no two neighbours are of one kind."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + piece.text)
        elif isinstance(piece, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(last.index, last.text + piece.text)
        else:
            joined.append(piece)
    return joined


class Parser(Protocol):
    """What reads one answer."""

    def push(self, text: str) -> list[Piece]:
        """What more text decides."""
        ...

    def finish(self) -> list[Piece]:
        """What is left at the text's end."""
        ...


class AnswerParser:
    """Reads one answer. With `style` and the `names` of tools it finds calls, and by `schemas` of
    their arguments what bare values mean; with `thinking`, two markers, it finds reasoning, which
    has begun already if `begun`. Between `channels`, two markers, there may be more anywhere."""

    def __init__(
        self,
        *,
        style: Style | None = None,
        names: Collection[str] = (),
        schemas: Schemas | None = None,
        thinking: tuple[str, str] | None = None,
        begun: bool = False,
        channels: tuple[str, str] | None = None,
    ) -> None:
        self._style = style
        self._channels: tuple[str, ...] = channels or ()
        self._schemas = {name: (schemas or {}).get(name, {}) for name in names}
        self._thinking = thinking
        self._begun = begun
        self._pieces: list[Piece] = []
        self._blank = ""  # shown once something follows it
        self._raw = ""  # all that was read since what may be a call began
        self._calls = 0
        self._announced = False
        self._reasoned = False
        self._machine = self._read()
        next(self._machine)

    def push(self, text: str) -> list[Piece]:
        """What more text decides."""
        for char in text:
            self._raw += char
            self._machine.send(char)
        return self._take()

    def finish(self) -> list[Piece]:
        """What is left at the text's end."""
        with contextlib.suppress(StopIteration):
            while True:
                self._machine.send("")
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return neighbours_joined(pieces)

    # The whole answer

    def _read(self) -> Machine:
        char = yield
        if self._thinking is not None:
            char = yield from self._reason(char, *self._thinking)
        style, channels = self._style, self._channels
        if style is None and not channels:
            while char:
                self._pieces.append(Content(char))
                self._raw = ""
                char = yield
            return ""
        begins = (*(style.begins if style is not None else ()), *channels)
        char = yield from self._skip(char, self._say)
        if style is not None and style.leading and char and char in "{[":
            char = yield from self._attempt(char, "")
        while char:
            char, found = yield from until(char, begins, self._say)
            if found in channels:
                if found == channels[0]:
                    blank, self._blank = self._blank, ""
                    char, _ = yield from until(char, channels[1:], self._think)
                    self._blank = blank
            elif found:
                char = yield from self._attempt(char, found)
        if self._blank:
            self._pieces.append(Content(self._blank))
            self._blank = ""
        return ""

    def _reason(self, char: str, begin: str, end: str) -> Machine:
        """Reasoning, if there is any."""
        blank = ""
        while char and char in BLANK:
            blank += char
            char = yield
        seen = ""
        if not self._begun:
            while char and begin.startswith(seen + char) and seen != begin:
                seen += char
                char = yield
            if seen != begin:
                # None: what was read belongs to the answer.
                return (yield from self._unread(blank + seen, char))
        elif char:
            # Some models repeat the marker that their prompt ends with.
            while char and begin.startswith(seen + char) and seen != begin:
                seen += char
                char = yield
            if seen and seen != begin:
                self._think(seen)
        char, found = yield from until(char, (end,), self._think)
        self._blank = ""
        # Blanks around the markers belong to neither.
        return (yield from self._skip(char)) if found else char

    def _think(self, text: str) -> None:
        """Reasoning, without the blanks around it."""
        text = self._blank + text
        shown = text.rstrip(BLANK)
        self._blank = text[len(shown) :]
        if not self._reasoned:
            shown = shown.lstrip(BLANK)
        if shown:
            self._reasoned = True
            self._pieces.append(Reasoning(shown))

    def _unread(self, text: str, char: str) -> Machine:
        """Read text again as what comes after the reasoning; `char` follows it."""
        rest = self._read_rest()
        next(rest)
        self._raw = ""
        for again in text:
            self._raw += again
            rest.send(again)
        self._raw += char
        while True:
            try:
                rest.send(char)
            except StopIteration:
                return ""
            char = yield

    def _read_rest(self) -> Machine:
        self._thinking = None
        return self._read()

    # Calls

    def _attempt(self, char: str, begin: str) -> Machine:
        """Read calls behind what announced them; if there is none, it is all content."""
        self._raw, self._announced = begin + char, False
        try:
            return (yield from self._all_calls(char))
        except Broken as broken:
            if not self._announced:
                self._say(self._raw[: len(self._raw) - len(broken.char)])
            return broken.char

    def _all_calls(self, char: str) -> Machine:
        assert self._style is not None
        while True:
            char = yield from self._some_calls(char)
            blanks: list[str] = []
            char = yield from self._skip(char, blanks.append)
            if not self._style.leading or char != ";":
                return (yield from self._finish_calls(char, "".join(blanks)))
            char = yield

    def _some_calls(self, char: str) -> Machine:
        """A list of calls, or one."""
        style = self._style
        assert style is not None
        char = yield from self._skip(char)
        if char == "[" and not style.lists:
            char = yield from self._skip((yield))
            while True:
                char = yield from self._skip((yield from self._call(char)))
                if char != ",":
                    break
                char = yield from self._skip((yield))
            require(char, "]")
            char = yield
        elif style.reader is not None and char != "{":
            char = yield from style.reader(char, self._schemas, self._announce, self._argue)
        elif char == "{" or not style.named:
            char = yield from self._call(char)
        else:
            char = yield from self._named_call(char)
        return char

    def _finish_calls(self, char: str, blank: str) -> Machine:
        """Leave out the mark that follows calls, and the blanks before it."""
        assert self._style is not None
        seen, end = "", self._style.end
        while char and end.startswith(seen + char) and seen != end:
            seen += char
            char = yield
        if seen == end and end:
            return char
        if char or not end:
            self._say(blank)
        # What began like the mark may begin another; at the text's end it was the mark, cut off.
        return seen + char if char else ""

    def _call(self, char: str) -> Machine:
        """One call: an object with a name and arguments."""
        name, held = "", list[str]()

        def argue(text: str) -> None:
            if name:
                self._argue(text)
            else:
                held.append(text)

        given = False
        require(char, "{")
        char = yield from self._skip((yield))
        while char == '"':
            key, char = yield from self._text(char)
            require((yield from self._skip(char)), ":")
            char = yield from self._skip((yield))
            if key == "name" and not name:
                found, char = yield from self._text(char)
                if found not in self._schemas:
                    raise Broken(char)
                self._announce(found)
                name = found
                for text in held:
                    argue(text)
            elif key in ARGUMENTS and not given:
                given = True
                char = yield from self._arguments(char, argue)
            else:
                char = yield from value(char, lambda _: None)
            char = yield from self._skip(char)
            if char == ",":
                char = yield from self._skip((yield))
                require(char, '"')
        if char != "}" or not name:
            raise Broken(char)
        if not given:
            argue("{}")
        return (yield)

    def _named_call(self, char: str) -> Machine:
        """A call that is a name and its arguments."""
        assert self._style is not None
        name = ""
        while char and char not in "{\n":
            name += char
            char = yield
        for part in self._style.parts:
            name = name.partition(part)[0]
        if char != "{" or name.strip() not in self._schemas:
            raise Broken(char)
        self._announce(name.strip())
        return (yield from value(char, self._argue))

    def _announce(self, name: str) -> None:
        self._blank = ""
        self._announced = True
        self._pieces.append(CallBegin(self._calls, name))
        self._calls += 1

    def _argue(self, text: str) -> None:
        self._pieces.append(CallArguments(self._calls - 1, text))

    def _arguments(self, char: str, argue: Sink) -> Machine:
        """An object; some models write it as a text that holds it."""
        if char == "{":
            return (yield from value(char, argue))
        text, char = yield from self._text(char)
        try:
            msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeEncodeError):
            raise Broken(char) from None
        argue(text)
        return char

    # Pieces of text

    def _say(self, text: str) -> None:
        """Content; blanks wait until something follows them."""
        text = self._blank + text
        shown = text.rstrip(BLANK)
        self._blank = text[len(shown) :]
        self._raw = ""
        if shown:
            self._pieces.append(Content(shown))

    def _skip(self, char: str, show: Sink | None = None) -> Machine:
        while char and char in BLANK:
            if show is not None:
                show(char)
            char = yield
        return char

    def _text(self, char: str) -> Generator[None, str, tuple[str, str]]:
        """A JSON string's value, and what follows it."""
        require(char, '"')
        raw: list[str] = []
        char = yield from string(raw.append)
        value = json.loads("".join(raw))
        return value, char
