"""OpenAI's Responses API: an answer's output items and their events, while it is read."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from engine import Delta, Usage
from engine.text.tokenizer import Tokenizer
from server.answer_parser import (
    AnswerParser,
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
)
from server.composers import ENDED
from server.errors import ErrorDetail
from server.format import chat_logprobs
from server.log import Event
from server.tools import call_id


class Item:
    """One output item: a message, a call or reasoning. `text` is its content or arguments."""

    def __init__(self, kind: str, place: int, name: str = "") -> None:
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}[kind]
        self.kind = kind
        self.id = f"{prefix}_{uuid.uuid4().hex}"
        self.call_id = f"call_{call_id()}"
        self.name = name
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []
        self.status = "in_progress"
        self._place = place

    def body(self) -> dict[str, Any]:
        """The item as it stands."""
        body: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return body | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": self.text}]
            return body | {"summary": [], "content": content}
        return body | {"role": "assistant", "content": [self._part()]}

    def begin(self) -> list[Event]:
        """What tells of its beginning."""
        empty: dict[str, Any] = {} if self.kind == "function_call" else {"content": []}
        item = self.body() | empty
        added = {"type": "response.output_item.added", "output_index": self._place, "item": item}
        if self.kind != "message":
            return [added]
        return [added, self._event("content_part.added", part=self._part())]

    def more(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        """What tells of more text."""
        self.text += text
        self.logprobs += logprobs
        if self.kind == "function_call":
            return self._event("function_call_arguments.delta", delta=text)
        if self.kind == "reasoning":
            return self._event("reasoning_text.delta", delta=text)
        return self._event("output_text.delta", delta=text, logprobs=logprobs)

    def end(self, status: str) -> list[Event]:
        """What tells of its end."""
        self.status = status
        done = {
            "type": "response.output_item.done",
            "output_index": self._place,
            "item": self.body(),
        }
        if self.kind == "function_call":
            whole = {"arguments": self.text, "name": self.name}
            return [self._event("function_call_arguments.done", **whole), done]
        if self.kind == "reasoning":
            return [self._event("reasoning_text.done", text=self.text), done]
        return [
            self._event("output_text.done", text=self.text, logprobs=self.logprobs),
            self._event("content_part.done", part=self._part()),
            done,
        ]

    def _part(self) -> dict[str, Any]:
        scores = [*self.logprobs]
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": scores}

    def _event(self, kind: str, **more: Any) -> Event:
        where: dict[str, Any] = {"item_id": self.id, "output_index": self._place}
        if self.kind != "function_call":
            where["content_index"] = 0
        return {"type": f"response.{kind}", **where, **more}


class ResponseComposer:
    """Makes the events. `settings` are the request's own fields, echoed; `parser` reads answers
    that have more than content."""

    def __init__(
        self,
        identifier: str,
        settings: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        parser: Callable[[], AnswerParser] | None = None,
    ) -> None:
        self.status = "queued"
        self.items: list[Item] = []
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs
        self._parser = None if parser is None else parser()
        self._open = False  # whether the last item is
        self._prepared = False
        self._finish = ""
        self._usage: Usage | None = None
        self._body: dict[str, Any] = {
            "id": identifier,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            **settings,
        }

    @property
    def text(self) -> str:
        """The answer's content so far."""
        return "".join(item.text for item in self.items if item.kind == "message")

    @property
    def spoken(self) -> list[dict[str, Any]]:
        calls = [
            {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": json.loads(item.text)},
            }
            for item in self.items
            if item.kind == "function_call" and item.status == "completed"
        ]
        if not self.text and not calls:
            return []
        message = {"role": "assistant", "content": self.text}
        return [message | ({"tool_calls": calls} if calls else {})]

    def begin(self, *, queued: bool) -> list[Event]:
        if not queued:
            self.status = "in_progress"
        names = ("created", "queued") if queued else ("created", "in_progress")
        return [{"type": f"response.{name}", "response": self.snapshot()} for name in names]

    def delta(self, delta: Delta) -> list[Event]:
        self._usage = delta.usage or self._usage
        self._finish = delta.finish_reason or self._finish
        events: list[Event] = []
        if self.status == "queued":
            self.status = "in_progress"
            events.append({"type": "response.in_progress", "response": self.snapshot()})
        scores = self._scores(delta)
        for piece in self._pieces(delta, scores):
            events += self._piece(piece, scores)
            scores = []
        return events

    def end(self, reason: str = "") -> list[Event]:
        self.status, name = "completed", "completed"
        details = {"length": "max_output_tokens", "abort": reason or None}.get(self._finish)
        if self._finish == "abort" and reason != "steered":
            self.status, name = "cancelled", "incomplete"
        elif details is not None:
            self.status, name = "incomplete", "incomplete"
            self._body["incomplete_details"] = {"reason": details}
        else:
            self._body["completed_at"] = int(time.time())
        events = self._close()
        return [*events, {"type": f"response.{name}", "response": self.snapshot()}]

    def nothing(self) -> list[Event]:
        self._prepared = True
        return [*self.begin(queued=False), *self.end()]

    def fail(self, error: ErrorDetail) -> list[Event]:
        self.status = "failed"
        code = "rate_limit_exceeded" if error.type == "rate_limit_error" else "server_error"
        self._body["error"] = {"code": code, "message": error.message}
        return [*self._close(), {"type": "response.failed", "response": self.snapshot()}]

    def snapshot(self) -> dict[str, Any]:
        usage = None if self._usage is None else response_usage(self._usage)
        items = self.items
        if not items and self.status in ENDED and not self._prepared:
            items = [Item("message", 0)]  # an answer without a word is still one
            items[0].status = self.status if self.status == "completed" else "incomplete"
        output = [item.body() for item in items]
        return {**self._body, "status": self.status, "output": output, "usage": usage}

    def _pieces(self, delta: Delta, scores: list[dict[str, Any]]) -> list[Piece]:
        if self._parser is None:
            return [Content(delta.text)] if delta.text or scores else []
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        return pieces

    def _piece(self, piece: Piece, scores: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        kind = {Content: "message", Reasoning: "reasoning"}.get(type(piece), "function_call")
        last = self.items[-1] if self.items and self._open else None
        if last is None or last.kind != kind or isinstance(piece, CallBegin):
            events += self._close("completed")
            name = piece.name if isinstance(piece, CallBegin) else ""
            last = Item(kind, len(self.items), name)
            self.items.append(last)
            self._open = True
            events += last.begin()
        match piece:
            case Content(text) | Reasoning(text):
                events.append(last.more(text, scores))
            case CallArguments(_, text):
                events.append(last.more(text, []))
        return events

    def _close(self, status: str = "") -> list[Event]:
        """End the last item, if it is open."""
        if not self._open:
            return []
        self._open = False
        ended = self.status if self.status in ("in_progress", "completed") else "incomplete"
        return self.items[-1].end(status or ended)

    def _scores(self, delta: Delta) -> list[dict[str, Any]]:
        if not self._wants_logprobs or not delta.logprobs:
            return []
        scores: list[dict[str, Any]] = chat_logprobs(self._tokenizer, delta.logprobs)["content"]
        return scores


def response_usage(usage: Usage) -> dict[str, Any]:
    """The Responses API's usage object."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def input_message(role: str, text: str) -> dict[str, Any]:
    """A message of input as it is listed."""
    kind = "output_text" if role == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": text}
    if role == "assistant":
        part["annotations"] = []
    identifier = f"msg_{uuid.uuid4().hex}"
    return {
        "id": identifier,
        "type": "message",
        "role": role,
        "status": "completed",
        "content": [part],
    }
