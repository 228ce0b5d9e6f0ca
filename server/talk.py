"""A conversation in the terminal."""

from __future__ import annotations

import importlib
import signal
import sys
from contextlib import aclosing, suppress
from typing import Any

import anyio
from anyio.abc import TaskStatus

from engine import AsyncEngine, ConfigError, InvalidRequest, RyzansteinError, SamplingParams
from server.answer_parser import Content, Piece, Reasoning
from server.answering import Wishes, prepare_answer

DIM, PLAIN = "\033[2m", "\033[0m"
PROMPT = "> "
# Of an answer, where the command line does not say how long it may be.
USUAL_TOKENS = 512
HELP = """/clear begins anew, /bye or Ctrl-D ends it, Ctrl-C stops an answer."""


async def converse(engine: AsyncEngine, system: str | None, given: dict[str, Any]) -> None:
    """Answer whoever sits there, until the end of what is typed. `given` are fields of
    `SamplingParams`. What goes wrong with one question is said, and the next one may come."""
    if engine.parts.tokenizer.chat_template is None:
        raise ConfigError(
            "this model has no chat template, so it only continues texts: use 'ryzanstein generate'"
        )
    messages = begun = [{"role": "system", "content": system}] if system else []
    _edit_lines()
    while (question := _asked()) is not None:
        if question == "/bye":
            return
        if question == "/clear":
            messages = begun
        elif question in ("/help", "/?"):
            _print(f"{HELP}\n")
        elif question:
            messages = await _answered(engine, messages, question, given)


async def _answered(
    engine: AsyncEngine, messages: list[dict[str, Any]], question: str, given: dict[str, Any]
) -> list[dict[str, Any]]:
    """The conversation after a question, with what there was of an answer that Ctrl-C stopped; as
    it was before if the question could not be answered."""
    asked, answer = [*messages, {"role": "user", "content": question}], Answer()
    failure: RyzansteinError | OSError | None = None
    async with anyio.create_task_group() as group:
        await group.start(_stop_at_ctrl_c, group.cancel_scope)
        try:
            await answer.show(engine, asked, given)
        except (RyzansteinError, OSError) as error:
            failure = error  # not as one of the group's
        group.cancel_scope.cancel()
    if isinstance(failure, OSError):
        raise failure
    if failure is not None:
        longer = isinstance(failure, InvalidRequest) and messages
        hint = "; /clear begins a new conversation" if longer else ""
        sys.stderr.write(f"error: {failure}{hint}\n")
        return messages
    answer.end()
    if not answer.content:
        return messages
    return [*asked, {"role": "assistant", "content": answer.content}]


async def _stop_at_ctrl_c(scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


class Answer:
    """An answer that is printed while it comes, reasoning dimly; `content` is what came so far."""

    def __init__(self) -> None:
        self.content = ""
        self._thought = False
        self._cut = 0

    async def show(
        self, engine: AsyncEngine, messages: list[dict[str, Any]], given: dict[str, Any]
    ) -> None:
        """Ask for it, and print it."""
        answering = await prepare_answer(engine, messages, Wishes())
        room = max(1, engine.parts.limits.context - len(answering.ids))
        most = min(given.get("max_tokens", USUAL_TOKENS), room)
        params = SamplingParams(**given | {"max_tokens": most})
        parser = answering.parser() if answering.parser is not None else None
        stream = engine.generate(answering.ids, answering.applied(params))
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                self._show([Content(delta.text)] if parser is None else parser.push(delta.text))
                if delta.finish_reason == "length":
                    self._cut = most
        if parser is not None:
            self._show(parser.finish())

    def end(self) -> None:
        """Close its last line, and say if it was cut."""
        _print("\n")
        if self._cut:
            _print(f"(cut at {self._cut} tokens; --max-tokens allows more)\n", dim=True)

    def _show(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Reasoning):
                self._thought = True
                _print(piece.text, dim=True)
            elif isinstance(piece, Content):
                if self._thought and not self.content:
                    _print("\n\n")
                self.content += piece.text
                _print(piece.text)


def _edit_lines() -> None:
    """Have lines read with a history and arrow keys at a terminal, where pasted ones stay together,
    and bytes that are no text as marks."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        # A Python without it reads plain lines.
        with suppress(ImportError):
            importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")


def _asked() -> str | None:
    """A line, None at the end. The event loop stands still meanwhile: nothing else runs then."""
    # In the loop's hands Ctrl-C would wait for the line's end.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(PROMPT).strip()
    except EOFError:
        return None
    finally:
        signal.signal(signal.SIGINT, before)


def _print(text: str, *, dim: bool = False) -> None:
    marked = dim and sys.stdout.isatty()
    sys.stdout.write(f"{DIM}{text}{PLAIN}" if marked else text)
    sys.stdout.flush()
