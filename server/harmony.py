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
from server.json_machine import BLANK, Broken, Machine, until, value
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
        self._channel = ""
        self._arguments: Machine | None = None  # reads those of a call
        self._shown: set[type[Piece]] = set()  # what other messages had
        self._said = False  # whether this message has
        self._pieces: list[Piece] = []
        self._machine = self._answer(opening)
        next(self._machine)

    def push(self, text: str) -> list[Piece]:
        """What more text decides."""
        for char in text:
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

    def _answer(self, opening: str) -> Machine:
        """Messages, each behind its header."""
        header, found, text = opening.rpartition(MESSAGE)
        char = yield
        if _is_open(opening):
            char = yield from self._message(header, char, said=bool(text.strip(BLANK)))
        title = [] if found else [opening]
        while char:
            char, mark = yield from until(char, (START, MESSAGE), title.append)
            if mark == MESSAGE:
                char = yield from self._message("".join(title), char)
            elif not mark:
                self._loose("".join(title))
            title = []
        return ""

    def _message(self, header: str, char: str, *, said: bool = False) -> Machine:
        self._open(header)
        self._said = said
        char, _ = yield from until(char, ENDS, self._read)
        self._close()
        return char

    def _loose(self, text: str) -> None:
        """What came last without a header, of a model that does without the format."""
        if TITLE.search(text) or ROLE.startswith(text):
            return
        self._channel = ""
        for char in text.removeprefix(ROLE).rstrip(BLANK):
            self._say(char)

    def _read(self, char: str) -> None:
        """A character of a message's text."""
        if self._arguments is None:
            self._say(char)
            return
        try:
            self._arguments.send(char)
        except StopIteration:
            self._arguments = None
        except Broken:
            self._arguments = None
            self._say(char)

    def _open(self, header: str) -> None:
        """A message begins whose header is this."""
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
    return _is_open(opening_of(prompt))


def _is_open(opening: str) -> bool:
    _, found, text = opening.rpartition(MESSAGE)
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
