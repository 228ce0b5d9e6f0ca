"""From deltas to the events of a response: OpenAI's Responses, and chat completions as events."""

from __future__ import annotations

import time
import uuid
from typing import Any, Protocol

import msgspec

from engine import Delta, Usage
from engine.text.tokenizer import Tokenizer
from server.errors import ErrorDetail
from server.format import Envelope, chat_logprobs, usage_body
from server.log import Event
from server.shapes import Shape

ENDED = ("completed", "incomplete", "failed", "cancelled")


class Composer(Protocol):
    """Makes one response's events; `status` is OpenAI's, `text` what was said so far."""

    status: str
    text: str

    def begin(self, *, queued: bool) -> list[Event]:
        """What is told before there is any output."""
        ...

    def delta(self, delta: Delta) -> list[Event]:
        """What a delta of output becomes."""
        ...

    def end(self, reason: str = "") -> list[Event]:
        """What is told when all output is there; `reason` says why it was cut, if it was."""
        ...

    def nothing(self) -> list[Event]:
        """What is told of a response that was only prepared."""
        ...

    def fail(self, error: ErrorDetail) -> list[Event]:
        """What is told when it went wrong."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """The response as it stands."""
        ...


class ResponseComposer:
    """The Responses API: one message of text. `settings` are the request's own fields, echoed."""

    def __init__(
        self, identifier: str, settings: dict[str, Any], tokenizer: Tokenizer, *, logprobs: bool
    ) -> None:
        self.status = "queued"
        self.text = ""
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs
        self._logprobs: list[dict[str, Any]] = []
        self._begun = False
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

    def begin(self, *, queued: bool) -> list[Event]:
        if not queued:
            self.status = "in_progress"
        names = ("created", "queued") if queued else ("created", "in_progress")
        return [{"type": f"response.{name}", "response": self.snapshot()} for name in names]

    def delta(self, delta: Delta) -> list[Event]:
        self._usage = delta.usage or self._usage
        self._finish = delta.finish_reason or self._finish
        scores = self._scores(delta)
        events: list[Event] = []
        if self.status == "queued":
            self.status = "in_progress"
            events.append({"type": "response.in_progress", "response": self.snapshot()})
        if not delta.text and not scores:
            return events
        if not self._begun:
            events += self._open()
        self.text += delta.text
        self._logprobs += scores
        events.append(self._event("output_text.delta", delta=delta.text, logprobs=scores))
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
        events = self._close() if self._begun else []
        return [*events, {"type": f"response.{name}", "response": self.snapshot()}]

    def nothing(self) -> list[Event]:
        self._prepared = True
        return [*self.begin(queued=False), *self.end()]

    def fail(self, error: ErrorDetail) -> list[Event]:
        self.status = "failed"
        code = "rate_limit_exceeded" if error.type == "rate_limit_error" else "server_error"
        self._body["error"] = {"code": code, "message": error.message}
        events = self._close() if self._begun else []
        return [*events, {"type": "response.failed", "response": self.snapshot()}]

    def snapshot(self) -> dict[str, Any]:
        usage = None if self._usage is None else response_usage(self._usage)
        shown = self._begun or (self.status in ENDED and not self._prepared)
        output = [self._message()] if shown else []
        return {**self._body, "status": self.status, "output": output, "usage": usage}

    def _open(self) -> list[Event]:
        self._begun = True
        item = {**self._message(), "content": []}
        added = {"type": "response.output_item.added", "output_index": 0, "item": item}
        return [added, self._event("content_part.added", part=self._part())]

    def _close(self) -> list[Event]:
        done = {"type": "response.output_item.done", "output_index": 0, "item": self._message()}
        return [
            self._event("output_text.done", text=self.text, logprobs=self._logprobs),
            self._event("content_part.done", part=self._part()),
            done,
        ]

    def _event(self, name: str, **more: Any) -> Event:
        where = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        return {"type": f"response.{name}", **where, **more}

    def _message(self) -> dict[str, Any]:
        status = self.status if self.status in ("in_progress", "completed") else "incomplete"
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        scores = self._logprobs if self._wants_logprobs else []
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": [*scores]}

    def _scores(self, delta: Delta) -> list[dict[str, Any]]:
        if not self._wants_logprobs or not delta.logprobs:
            return []
        scores: list[dict[str, Any]] = chat_logprobs(self._tokenizer, delta.logprobs)["content"]
        return scores


class ChatComposer:
    """A chat completion as events: its chunks, between what begins and ends every response."""

    def __init__(self, wrapper: Envelope, shape: Shape) -> None:
        self.status = "queued"
        self.text = ""
        self._wrapper = wrapper
        self._shape = shape
        self._usages: list[Usage] = []
        self._reasons: list[str] = []
        self._error: ErrorDetail | None = None

    def begin(self, *, queued: bool) -> list[Event]:
        self.status = "in_progress"
        return [{"type": "response.created", "response": self.snapshot()}]

    def delta(self, delta: Delta) -> list[Event]:
        if delta.usage is not None:
            self._usages.append(delta.usage)
        if delta.finish_reason is not None:
            self._reasons.append(delta.finish_reason)
        if delta.index == 0:
            self.text += delta.text
        return [
            {"type": "chat.completion.chunk", "chunk": self._wrapper.body([choice])}
            for choice in self._shape.chunk(delta)
        ]

    def end(self, reason: str = "") -> list[Event]:
        cut = "abort" in self._reasons
        self.status = "cancelled" if cut else "completed"
        name = "incomplete" if cut else "completed"
        return [{"type": f"response.{name}", "response": self.snapshot()}]

    def nothing(self) -> list[Event]:
        return [*self.begin(queued=False), *self.end()]

    def fail(self, error: ErrorDetail) -> list[Event]:
        self.status, self._error = "failed", error
        return [{"type": "response.failed", "response": self.snapshot()}]

    def snapshot(self) -> dict[str, Any]:
        return {
            "id": self._wrapper.id,
            "object": "chat.completion",
            "created": self._wrapper.created,
            "model": self._wrapper.model,
            "status": self.status,
            "usage": self._usage(),
            "error": None if self._error is None else msgspec.structs.asdict(self._error),
        }

    def _usage(self) -> Any:
        return usage_body(self._usages) if self._usages else None


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
