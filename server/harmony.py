"""OpenAI's harmony format, which gpt-oss speaks: an answer is messages, each in a channel.

`analysis` holds reasoning, `final` the answer, `commentary` what is said about calls, or a call:
a message to `functions.<name>` whose text is the arguments.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from engine import Grammar, InvalidRequest
from engine.text.grammar import embedded
from engine.text.tokenizer import Tokenizer
from server.answer_parser import (
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
    Style,
    neighbours_joined,
)
from server.json_machine import BLANK, Broken, Machine, value
from server.lark import any_text, form_rule, literal, mark
from server.tools import ANY_OBJECT, Offered

STYLE = Style("harmony", ("<|channel|>",), special=True)
START, MESSAGE = "<|start|>", "<|message|>"
# What follows a message's text; the last two end the answer.
ENDS = ("<|end|>", START, "<|call|>", "<|return|>")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
TITLE = re.compile(r"<\||\bto=")
FUNCTIONS = "functions."
ROLE = "assistant"
# What the template knows of efforts.
EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high"}


class HarmonyParser:
    """Reads one answer, wherever it is cut, and finds calls of the tools in `names`. `opening` is
    the prompt from its last message's role on."""

    def __init__(self, *, names: Collection[str], opening: str) -> None:
        self._names = names
        self._calls = 0
        self._held = ""  # what may be, or become, a mark
        self._header: str | None = ""  # of the message that begins; None within a message
        self._channel = ""
        self._arguments: Machine | None = None  # reads those of a call
        self._shown: set[type[Piece]] = set()  # what other messages had
        self._said = False  # whether this message has
        self._pieces: list[Piece] = []
        self.push(opening)
        for char in self._held:
            self._read(char)
        self._held = ""
        self._take()
        self._shown.clear()

    def push(self, text: str) -> list[Piece]:
        """What more text decides."""
        for char in text:
            self._held += char
            marks = ENDS if self._header is None else (START, MESSAGE)
            while self._held and not any(mark.startswith(self._held) for mark in marks):
                self._read(self._held[0])
                self._held = self._held[1:]
            if self._held in marks:
                self._mark(self._held)
                self._held = ""
        return self._take()

    def finish(self) -> list[Piece]:
        """What is left at the text's end."""
        for char in self._held:
            self._read(char)
        self._held = ""
        if self._header is None:
            self._close()
        elif not TITLE.search(self._header) and not ROLE.startswith(self._header):
            # A model that does without the format.
            loose = self._header.removeprefix(ROLE)
            self._header, self._channel = None, ""
            for char in loose.rstrip(BLANK):
                self._say(char)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return neighbours_joined(pieces)

    def _read(self, char: str) -> None:
        if self._header is not None:
            self._header += char
        elif self._arguments is None:
            self._say(char)
        else:
            try:
                self._arguments.send(char)
            except StopIteration:
                self._arguments = None
            except Broken:
                self._arguments = None
                self._say(char)

    def _mark(self, mark: str) -> None:
        if mark == MESSAGE:
            self._open(self._header or "")
            return
        if self._header is None:
            self._close()
        self._header = ""

    def _open(self, header: str) -> None:
        """A message begins whose header is this."""
        self._header, self._said = None, False
        channel, recipient = CHANNEL.search(header), RECIPIENT.search(header)
        self._channel = channel[1] if channel else ""
        name = recipient[1].removeprefix(FUNCTIONS) if recipient else ""
        if name in self._names:
            self._pieces.append(CallBegin(self._calls, name))
            self._arguments = self._read_arguments(self._calls)
            next(self._arguments)
            self._calls += 1

    def _close(self) -> None:
        """A message's end."""
        if self._arguments is not None:
            with contextlib.suppress(StopIteration, Broken):
                self._arguments.send("")
        self._arguments = None
        if self._said:
            self._shown.add(Reasoning if self._channel == "analysis" else Content)
        self._said = False

    def _read_arguments(self, index: int) -> Machine:
        char = yield
        while char and char in BLANK:
            char = yield
        if not char:
            self._pieces.append(CallArguments(index, "{}"))
            return ""
        if char != "{":
            raise Broken(char)
        char = yield from value(char, lambda text: self._pieces.append(CallArguments(index, text)))
        while char and char in BLANK:
            char = yield
        if char:
            raise Broken(char)
        return ""

    def _say(self, char: str) -> None:
        kind: type[Reasoning | Content] = Reasoning if self._channel == "analysis" else Content
        if not self._said:
            if char in BLANK and self._channel != "final":
                return
            char = "\n\n" + char if kind in self._shown else char
            self._said = True
        self._pieces.append(kind(char))


def opening_of(prompt: str) -> str:
    """The prompt from its last message's role on."""
    return prompt.rpartition(START)[2]


def has_begun(prompt: str) -> bool:
    """Whether the prompt ends within the text of a message, which the answer goes on with."""
    _, found, text = opening_of(prompt).rpartition(MESSAGE)
    return bool(found) and not any(end in text for end in ENDS)


def told(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the template wants them: instructions first, one call a message and its result
    behind it, and what led to a call as `thinking`."""
    instructions = [m["content"] for m in messages if m["role"] == "system"]
    made: list[dict[str, Any]] = []
    if instructions:
        made.append({"role": "system", "content": "\n\n".join(instructions)})
    behind: set[int] = set()  # results that stand behind their call
    for place, message in enumerate(messages):
        plain = {k: v for k, v in message.items() if k not in ("reasoning_content", "tool_calls")}
        calls = message.get("tool_calls") or ()
        if not calls and message["role"] != "system" and place not in behind:
            made.append(plain)
        thoughts = (message.get("reasoning_content"), message.get("content"))
        for number, call in enumerate(calls):
            thinking = "\n\n".join(text for text in thoughts if text) if number == 0 else ""
            about = {"thinking": thinking} if thinking else {}
            made.append({**plain, "content": "", **about, "tool_calls": [call]})
            # Ids may come again in later turns.
            for later in range(place + 1, len(messages)):
                result = messages[later]
                if result.get("tool_call_id") == call.get("id") and later not in behind:
                    behind.add(later)
                    made.append(dict(result))
                    break
    return made


def variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables, efforts among those that it knows."""
    effort = given.get("reasoning_effort")
    if isinstance(effort, str) and effort in EFFORTS:
        return {**given, "reasoning_effort": EFFORTS[effort]}
    return dict(given)


def answer_grammar(
    tokenizer: Tokenizer,
    offered: Offered | None,
    form: Grammar | None,
    *,
    reasons: bool,
    begun: bool,
    budget: int | None,
) -> Grammar | None:
    """The grammar of an answer, as `constraints.constraint` has it of others, with `begun` of the
    rest of its last message; None if it may be anything. Raises InvalidRequest if a call is wanted
    of the rest of a message."""
    calls = offered is not None and offered.enforced
    if begun and offered is not None and offered.forced:
        raise InvalidRequest(
            "an answer that goes on with a message cannot begin with a call", param="tool_choice"
        )
    if begun:
        return form or (Grammar("regex", "(.|\\n)*") if calls else None)
    if form is None and not calls and reasons and budget is None:
        return None
    channel, message, end = (mark(tokenizer, m) for m in ("<|channel|>", MESSAGE, "<|end|>"))
    again = f'{end} {mark(tokenizer, START)} "assistant"'
    rules: list[str] = []
    text = any_text(rules)
    answers: list[str] = []
    if offered is not None and offered.choice != "none":
        for number, tool in enumerate(offered.callable_tools):
            schema = tool.arguments if tool.strict or offered.forced else ANY_OBJECT
            body = f"%json {embedded(Grammar.json_schema(schema))}"
            head = literal(f"commentary to={FUNCTIONS}{tool.name} ")
            kind = f'{mark(tokenizer, "<|constrain|>")} "json"'
            rules.append(f"call_{number}: {channel} {head} {kind} {message} {body}")
            answers.append(f"call_{number}")
        said = f'{channel} "commentary" {message} {text} {again}'
        rules.append(f"calls: ({said})? ({' | '.join(answers)})")
        answers = ["calls"]
    if offered is None or not offered.forced:
        body = text if form is None else form_rule(form)
        rules.append(f'final: {channel} "final" {message} {body}')
        answers.append("final")
    start = f"({' | '.join(answers)})"
    if reasons:
        cap = "" if budget is None else f"[max_tokens={max(1, budget)}]"
        rules.append(f"thought{cap}: {text}")
        rules.append(f'analysis: {channel} "analysis" {message} thought {again}')
        start = f"analysis{'*' if budget is None else '?'} {start}"
    return Grammar("lark", "\n".join([f"start: {start}", *rules]))
