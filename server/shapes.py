"""How deltas become choices: one shape for chat, one for plain completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine import Delta, TokenLogprob
from engine.text.tokenizer import Tokenizer
from server.answer_parser import (
    CallArguments,
    CallBegin,
    Content,
    Parser,
    Piece,
    Reasoning,
)
from server.format import CompletionLogprobs, chat_logprobs, finish_reason
from server.tools import call_id


class Shape(Protocol):
    """Turns one choice's deltas into OpenAI's choice objects."""

    kind: str
    chunk_kind: str
    hidden_tokens: int
    """Tokens of each choice that the engine made but the client did not ask for."""

    def chunk(self, delta: Delta) -> list[dict[str, Any]]:
        """Choice objects to stream for a delta; the finish reason comes in one of its own."""
        ...

    def is_plain(self, index: int) -> bool:
        """Whether the chunks of a choice are, up to its end, what is `spoken` and no more. One that
        is stays so."""
        ...

    def spoken(self, index: int, text: str) -> dict[str, Any]:
        """The choice object of a chunk that adds text."""
        ...

    def whole(self, delta: Delta) -> dict[str, Any]:
        """The choice object of a merged delta."""
        ...


class Answer:
    """One choice's answer as OpenAI's chat shows it, while it is read."""

    def __init__(self, parser: Parser | None) -> None:
        self._parser = parser
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def read(self, delta: Delta) -> list[dict[str, Any]]:
        """The parts of a message that a delta adds."""
        if self._parser is None:
            self._content.append(delta.text)
            return [{"content": delta.text}] if delta.text else []
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        return [self._part(piece) for piece in pieces]

    def message(self) -> dict[str, Any]:
        """The whole: content, reasoning and calls, as far as there are any."""
        content = "".join(self._content)
        message: dict[str, Any] = {"content": content if content or not self._calls else None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def finish_reason(self, delta: Delta) -> str | None:
        """Why it ended, as OpenAI names it."""
        reason = finish_reason(delta.finish_reason)
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _part(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Content(text):
                self._content.append(text)
                return {"content": text}
            case Reasoning(text):
                self._reasoning.append(text)
                return {"reasoning_content": text}
            case CallBegin(index, name):
                function = {"name": name, "arguments": ""}
                call = {"id": call_id(), "type": "function", "function": function}
                self._calls.append(call)
                return {"tool_calls": [{"index": index, **call, "function": dict(function)}]}
            case CallArguments(index, text):
                self._calls[index]["function"]["arguments"] += text
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


class ChatShape:
    """`chat.completion`: a role first, then content."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    hidden_tokens = 0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        token_ids: bool = False,
        parser: Callable[[], Parser] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._ids = token_ids
        self._make_parser = parser
        # What has begun, by choice.
        self._answers: dict[int, Answer] = {}
        self._plain = parser is None and not logprobs and not token_ids

    def is_plain(self, index: int) -> bool:
        return self._plain and index in self._answers

    def spoken(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, {"content": text})

    def chunk(self, delta: Delta) -> list[dict[str, Any]]:
        choices = []
        answer = self._answers.get(delta.index)
        if answer is None:
            answer = self._answers[delta.index] = self._answer()
            choices.append(self._choice(delta.index, {"role": "assistant", "content": ""}))
        parts = answer.read(delta)
        scored = (self._logprobs and delta.logprobs) or (self._ids and delta.token_ids)
        if not parts and scored:
            parts = [{"content": ""}]
        for number, part in enumerate(parts):
            choice = self._choice(delta.index, part)
            if number == 0:
                choice["logprobs"] = self._scores(delta)
                choice |= {"token_ids": delta.token_ids} if self._ids else {}
            choices.append(choice)
        if delta.finish_reason is not None:
            choice = self._choice(delta.index, {})
            choice["finish_reason"] = answer.finish_reason(delta)
            choices.append(choice)
        return choices

    def whole(self, delta: Delta) -> dict[str, Any]:
        answer = self._answer()
        answer.read(delta)
        choice = {
            "index": delta.index,
            "message": {"role": "assistant", **answer.message(), "refusal": None},
            "logprobs": self._scores(delta),
            "finish_reason": answer.finish_reason(delta),
        }
        if delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(self._tokenizer, delta.prompt_logprobs)
        if self._ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _answer(self) -> Answer:
        return Answer(None if self._make_parser is None else self._make_parser())

    def _scores(self, delta: Delta) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, delta.logprobs) if self._logprobs else None


@dataclass(frozen=True)
class Echo:
    """A prompt as it is shown before its completion."""

    text: str
    ids: Sequence[int]


class CompletionShape:
    """`text_completion`; `echoes` holds each prompt if the client wants to see it."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        choices_per_prompt: int,
        logprobs: bool,
        echoes: Sequence[Echo] | None = None,
        prompt_only: bool = False,
        prompt_logprobs: bool = False,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._n = choices_per_prompt
        self._logprobs = logprobs
        self._echoes = echoes
        self._prompt_logprobs = prompt_logprobs
        # Given if token ids are to be shown, those of each prompt with its first ones.
        self._ids = prompt_ids
        self.hidden_tokens = 1 if prompt_only else 0
        self._scores: dict[int, CompletionLogprobs] = {}
        self._plain = not logprobs and prompt_ids is None and not prompt_only

    def is_plain(self, index: int) -> bool:
        return self._plain and index in self._scores

    def spoken(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, text, None)

    def chunk(self, delta: Delta) -> list[dict[str, Any]]:
        choices = []
        first = delta.index not in self._scores
        echo = self._echo(delta.index) if first else None
        text, scores = self._content(delta)
        if text or delta.token_ids or echo is not None:
            choices.append(self._choice(delta.index, text, scores) | self._tokens(delta, first))
        if delta.finish_reason is not None:
            end = self._choice(delta.index, "", None)
            choices.append(end | {"finish_reason": self._reason(delta)})
        return choices

    def whole(self, delta: Delta) -> dict[str, Any]:
        text, scores = self._content(delta)
        choice = self._choice(delta.index, text, scores)
        choice["finish_reason"] = self._reason(delta)
        choice |= self._tokens(delta, first=True)
        if self._prompt_logprobs and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(self._tokenizer, delta.prompt_logprobs)
        return choice

    def _content(self, delta: Delta) -> tuple[str, dict[str, Any] | None]:
        """Text and logprobs of a delta, the prompt's first if it is the choice's first."""
        first = delta.index not in self._scores
        counter = self._scores.setdefault(delta.index, CompletionLogprobs(self._tokenizer))
        echo = self._echo(delta.index) if first else None
        text = "" if self.hidden_tokens else delta.text
        logprobs: list[TokenLogprob | None] = [] if self.hidden_tokens else [*delta.logprobs]
        ids: Sequence[int] = ()
        if echo is not None:
            text = echo.text + text
            logprobs = [*(delta.prompt_logprobs or []), *logprobs]
            ids = echo.ids
        return text, counter.take(logprobs, ids) if self._logprobs else None

    def _tokens(self, delta: Delta, first: bool) -> dict[str, Any]:
        if self._ids is None:
            return {}
        tokens: dict[str, Any] = {"token_ids": [] if self.hidden_tokens else delta.token_ids}
        if first:
            tokens["prompt_token_ids"] = self._ids[delta.index // self._n]
        return tokens

    def _echo(self, index: int) -> Echo | None:
        return self._echoes[index // self._n] if self._echoes is not None else None

    def _reason(self, delta: Delta) -> str | None:
        return "length" if self.hidden_tokens else finish_reason(delta.finish_reason)

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


def prompt_scores(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None]
) -> list[dict[str, Any] | None]:
    """vLLM's form of prompt logprobs: per position, token id to logprob and text."""
    positions: list[dict[str, Any] | None] = []
    for item in logprobs:
        if item is None:
            positions.append(None)
            continue
        scores = {item.token_id: item.logprob} | dict(item.top)
        positions.append(
            {
                str(token): {
                    "logprob": max(value, -9999.0),
                    "decoded_token": tokenizer.token_bytes(token).decode("utf-8", "replace"),
                }
                for token, value in scores.items()
            }
        )
    return positions
