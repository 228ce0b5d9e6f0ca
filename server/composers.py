"""From deltas to the events of a response; here those of chat completions."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from engine import Delta, Usage
from server.errors import ErrorDetail
from server.format import Envelope, usage_body
from server.log import Event
from server.shapes import Shape

ENDED = ("completed", "incomplete", "failed", "cancelled")


class Composer(Protocol):
    """Makes one response's events; `status` is OpenAI's."""

    status: str

    @property
    def spoken(self) -> list[dict[str, Any]]:
        """What was said so far, as messages for a chat template."""
        ...

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

    @property
    def spoken(self) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": self.text}] if self.text else []

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
