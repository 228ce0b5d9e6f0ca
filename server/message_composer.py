"""Anthropic's Messages API: an answer's content blocks and their events, while it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine import Delta, Usage
from server.answer_parser import CallArguments, CallBegin, Content, Parser, Piece, Reasoning
from server.log import Event
from server.tools import call_id, object_in

# By kind of block: where its text lies, and what a delta and its text are called.
TEXTS = {
    "text": ("text", "text_delta", "text"),
    "thinking": ("thinking", "thinking_delta", "thinking"),
    "tool_use": ("input", "input_json_delta", "partial_json"),
}


class MessageComposer:
    """Makes the events of one message; `body` is the message as it stands."""

    def __init__(
        self,
        identifier: str,
        model: str,
        prompt_tokens: int,
        parser: Callable[[], Parser] | None,
    ) -> None:
        self._identifier = identifier
        self._model = model
        self._parser = None if parser is None else parser()
        self._usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=0)
        self._blocks: list[dict[str, Any]] = []
        self._said: list[list[str]] = []
        self._last = Delta()

    def begin(self) -> list[Event]:
        """Before there is any output."""
        begun = self.body() | {"content": []}
        return [{"type": "message_start", "message": begun}, {"type": "ping"}]

    def delta(self, delta: Delta) -> list[Event]:
        """What a delta of output becomes."""
        self._last = delta
        self._usage = delta.usage or self._usage
        events: list[Event] = []
        for piece in self._pieces(delta):
            events += self._piece(piece)
        return events

    def end(self) -> list[Event]:
        """When all output is there."""
        # An answer without a word is still one.
        events = [] if self._blocks else self._open({"type": "text", "text": ""})
        events.append({"type": "content_block_stop", "index": len(self._blocks) - 1})
        told = {"type": "message_delta", "delta": self._stop(), "usage": usage_body(self._usage)}
        return [*events, told, {"type": "message_stop"}]

    def body(self) -> dict[str, Any]:
        """The message as it stands."""
        blocks = []
        for block, said in zip(self._blocks, self._said, strict=True):
            text = "".join(said)
            field = TEXTS[block["type"]][0]
            value = object_in(text) if field == "input" else text
            # What the model broke off is nothing that can be called.
            if value is not None:
                blocks.append(block | {field: value})
        return {
            "id": self._identifier,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks or [{"type": "text", "text": ""}],
            **self._stop(),
            "usage": usage_body(self._usage),
        }

    def _pieces(self, delta: Delta) -> list[Piece]:
        if self._parser is None:
            return [Content(delta.text)] if delta.text else []
        pieces = self._parser.push(delta.text)
        return pieces + self._parser.finish() if delta.finish_reason is not None else pieces

    def _piece(self, piece: Piece) -> list[Event]:
        match piece:
            case CallBegin(_, name):
                identifier = f"toolu_{call_id()}"
                return self._open({"type": "tool_use", "id": identifier, "name": name, "input": {}})
            case Content(text):
                return self._more({"type": "text", "text": ""}, text)
            case Reasoning(text):
                return self._more({"type": "thinking", "thinking": "", "signature": ""}, text)
            case CallArguments(_, text):
                return self._more(self._blocks[-1], text)

    def _open(self, block: dict[str, Any]) -> list[Event]:
        """A block begins, which ends the one before it."""
        index = len(self._blocks)
        events: list[Event] = []
        if index:
            events.append({"type": "content_block_stop", "index": index - 1})
        self._blocks.append(block)
        self._said.append([])
        return [*events, {"type": "content_block_start", "index": index, "content_block": block}]

    def _more(self, block: dict[str, Any], text: str) -> list[Event]:
        """More text of a block, which begins if the last one is of another kind."""
        kind = block["type"]
        begins = not self._blocks or self._blocks[-1]["type"] != kind
        events = self._open(block) if begins else []
        self._said[-1].append(text)
        _, name, field = TEXTS[kind]
        told = {"type": name, field: text}
        index = len(self._blocks) - 1
        return [*events, {"type": "content_block_delta", "index": index, "delta": told}]

    def _stop(self) -> dict[str, Any]:
        """Why it ended: a stop sequence is named."""
        last = self._last
        sequence = last.stop_reason if isinstance(last.stop_reason, str) else None
        reasons = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}
        reason = "stop_sequence" if sequence else reasons.get(last.finish_reason or "")
        if reason == "end_turn":
            calls = [
                object_in("".join(said))
                for block, said in zip(self._blocks, self._said, strict=True)
                if block["type"] == "tool_use"
            ]
            # Clients make no calls of an answer that was cut off.
            reason = "max_tokens" if None in calls else "tool_use" if calls else reason
        return {"stop_reason": reason, "stop_sequence": sequence}


def usage_body(usage: Usage) -> dict[str, int]:
    """Tokens that were found in the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
