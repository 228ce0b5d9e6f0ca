"""The events of OpenAI's streams: a chunk for what is new of each choice."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec

from engine import Delta, Usage
from server.format import Envelope, usage_body
from server.protocol import StreamOptions
from server.shapes import Shape
from server.streams import Put, event_of


class ChunkEvents:
    """A stream's events, for `put`; `first` is put into the first of them. With `include_usage`
    every chunk has a `usage`: null but in the last one, or what there is so far with
    `continuous_usage_stats`."""

    __slots__ = (
        "_after",
        "_around",
        "_before",
        "_counted",
        "_first",
        "_made",
        "_prompt",
        "_put",
        "_running",
        "_shape",
        "_usages",
        "_wrapper",
    )

    def __init__(
        self,
        put: Put,
        wrapper: Envelope,
        shape: Shape,
        prompt_tokens: int,
        first: dict[str, Any],
        options: StreamOptions,
    ) -> None:
        self._put = put
        self._wrapper = wrapper
        self._shape = shape
        self._counted = options.include_usage
        self._running = options.include_usage and options.continuous_usage_stats
        before, after = wrapper.around_choice(**({"usage": None} if self._counted else {}))
        self._before, self._after = b"data: " + before, after + b"\n\n"
        # The bytes of an event before and after its text, by choice, where there is nothing else.
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._first = first
        self._prompt = prompt_tokens
        # Tokens so far, where that is asked for.
        self._made = 0
        self._usages: list[Usage] = []

    def pass_on(self, deltas: Sequence[Delta]) -> Awaitable[None] | None:
        """Put the events of some deltas; what remains to be awaited."""
        return self._put(self.of(deltas))

    def of(self, deltas: Sequence[Delta]) -> bytes:
        """The events of some deltas; none if there is nothing to show."""
        events: list[bytes] = []
        for delta in deltas:
            around = self._around.get(delta.index)
            if around is not None and delta.text and delta.finish_reason is None:
                events += around[0], msgspec.json.encode(delta.text), around[1]
                continue
            if delta.usage is not None:
                self._usages.append(delta.usage)
            self._made += len(delta.token_ids)
            for choice in self._shape.chunk(delta):
                if self._first or self._running:
                    events.append(self._with_more(choice))
                else:
                    events += self._before, msgspec.json.encode(choice), self._after
            plain = around is None and self._shape.is_plain(delta.index)
            if plain and not self._first and not self._running:
                self._around[delta.index] = self._around_text(delta.index)
        return b"".join(events)

    def last(self) -> bytes:
        """The event behind all choices, if usage is wanted."""
        if not self._counted:
            return b""
        usage = usage_body(asked_usages(self._usages, self._shape))
        return event_of(self._wrapper.body([], usage=usage))

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        choice = msgspec.json.encode(self._shape.spoken(index, ""))
        before, _, after = choice.partition(b'""')
        return self._before + before, after + self._after

    def _with_more(self, choice: dict[str, Any]) -> bytes:
        usage = Usage(prompt_tokens=self._prompt, completion_tokens=self._made)
        more = {"usage": usage_body([usage])} if self._running else {}
        first, self._first = self._first, {}
        return event_of(self._wrapper.body([choice], **first, **more))


def asked_usages(usages: list[Usage], shape: Shape) -> list[Usage]:
    """Usage without the tokens that nobody asked for."""
    if not shape.hidden_tokens:
        return usages
    return [msgspec.structs.replace(u, completion_tokens=0) for u in usages]
