"""OpenAI's Responses API: an answer's output items and their events, while it is read."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from engine import Delta, Usage
from engine.text.tokenizer import Tokenizer
from server.answer_parser import (
    CallArguments,
    CallBegin,
    Content,
    Parser,
    Piece,
    Reasoning,
)
from server.bridge.approvals import REQUEST, Approval
from server.composers import ENDED
from server.errors import ErrorDetail
from server.format import chat_logprobs
from server.log import Event
from server.output_items import CALLS, Item
from server.tools import object_in


class ResponseComposer:
    """Makes the events. `settings` are the request's own fields, echoed; `parser` reads answers
    that have more than content; `remote` says by a tool's name which server has it, and `asking`
    whose calls wait for an approval.

    With such tools an answer has several turns: when one has ended, `end_turn` says which calls are
    to be made, `called` what came back, and `next_turn` that the model goes on.
    """

    def __init__(
        self,
        identifier: str,
        settings: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        parser: Callable[[], Parser] | None = None,
        remote: Mapping[str, str] | None = None,
        asking: Collection[str] = (),
    ) -> None:
        self.status = "queued"
        self._remote = remote or {}
        self._asking = asking
        self._turn = self._turns = 0  # the first item of the turn, and the turns before it
        self.items: list[Item] = []
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs
        self._parser = None if parser is None else parser()
        self._open = False  # whether the last item is
        self._held: list[dict[str, Any]] = []
        self._prepared = False
        self._finish = ""
        self._usage: Usage | None = None
        self._earlier: Usage | None = None  # of the turns before
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
        messages: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        turn = 0
        for item in self.items:
            if item.kind not in ("message", *CALLS) or (
                item.kind in CALLS and item.status not in ("completed", "failed")
            ):
                continue
            if not messages or (results and item.turn != turn):
                messages += results
                results = []
                messages.append({"role": "assistant", "content": ""})
            turn = item.turn
            if item.kind == "message":
                messages[-1]["content"] += item.text
                continue
            function = {"name": item.name, "arguments": json.loads(item.text)}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
            if item.kind == "mcp_call":
                told = item.result if item.error is None else f"error: {item.error}"
                result = {"role": "tool", "tool_call_id": item.call_id, "content": told or ""}
                results.append(result)
        messages += results
        return [m for m in messages if m["content"] or m.get("tool_calls") or m["role"] == "tool"]

    def list_tools(self, server: str, tools: Sequence[dict[str, Any]]) -> None:
        """Before anything else, a server's tools are told."""
        item = Item("mcp_list_tools", len(self.items), server=server)
        item.tools = list(tools)
        self.items.append(item)
        self._turn = len(self.items)

    def take_up(self, approvals: Sequence[Approval]) -> tuple[list[Event], list[Item]]:
        """Before the first turn, what the client said to earlier requests; the calls that are to be
        made."""
        events, calls = self._started(), list[Item]()
        for approval in approvals:
            item = Item("mcp_call", len(self.items), approval.name, approval.server)
            item.approval = approval.request_id
            self.items.append(item)
            events += [*item.begin(), *item.more(approval.arguments, []), item.asked()]
            if approval.refusal is None:
                calls.append(item)
            else:
                events += self.called(item, None, approval.refusal)
        return events, calls

    def end_turn(self) -> tuple[list[Event], list[Item], bool]:
        """What tells of a turn's end, the calls that are to be made, and whether the client has to
        do something then. If not, and if there are no calls, this was the last turn."""
        if self._finish != "stop":
            return [], [], False
        events = self._close("completed")
        made = self.items[self._turn :]
        waits = any(item.kind in ("function_call", REQUEST) for item in made)
        return events, [item for item in made if item.status == "calling"], waits

    def called(self, item: Item, result: str | None, error: str | None) -> list[Event]:
        """What came back from a call."""
        item.result, item.error = result, error
        return item.end("completed")

    def next_turn(self, parser: Callable[[], Parser] | None) -> None:
        """The model goes on."""
        self._parser = None if parser is None else parser()
        self._turn, self._turns = len(self.items), self._turns + 1
        self._held = []
        self._earlier, self._usage = self._whole_usage(), None
        self._finish = ""

    def cut(self) -> None:
        """It ends where it is, between two turns."""
        self._finish = "abort"

    def run_out(self) -> None:
        """Its turns have used all the tokens that it may have."""
        self._finish = "length"

    @property
    def made_tokens(self) -> int:
        """Tokens that were made so far."""
        whole = self._whole_usage()
        return 0 if whole is None else whole.completion_tokens

    def begin(self, *, queued: bool) -> list[Event]:
        if not queued:
            self.status = "in_progress"
        names = ("created", "queued") if queued else ("created", "in_progress")
        # The servers' tools are told as items of their own.
        begun = {**self.snapshot(), "output": []}
        events: list[Event] = [{"type": f"response.{name}", "response": begun} for name in names]
        for item in self.items:
            events += [*item.begin(), *item.end("completed")]
        return events

    def delta(self, delta: Delta) -> list[Event]:
        self._usage = delta.usage or self._usage
        self._finish = delta.finish_reason or self._finish
        events = self._started()
        # Text may be held back for a while; its tokens' scores come with it.
        self._held += self._scores(delta)
        for piece in self._pieces(delta, self._held):
            scores = self._held if isinstance(piece, Content) else []
            events += self._piece(piece, scores)
            if isinstance(piece, Content):
                self._held = []
        return events

    def _started(self) -> list[Event]:
        """It waits no longer, if it did."""
        if self.status != "queued":
            return []
        self.status = "in_progress"
        return [{"type": "response.in_progress", "response": self.snapshot()}]

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
        events = [*self._close(), *self._close_calls()]
        return [*events, {"type": f"response.{name}", "response": self.snapshot()}]

    def nothing(self) -> list[Event]:
        self._prepared = True
        return [*self.begin(queued=False), *self.end()]

    def fail(self, error: ErrorDetail) -> list[Event]:
        self.status = "failed"
        code = "rate_limit_exceeded" if error.type == "rate_limit_error" else "server_error"
        self._body["error"] = {"code": code, "message": error.message}
        events = [*self._close(), *self._close_calls()]
        return [*events, {"type": "response.failed", "response": self.snapshot()}]

    def snapshot(self) -> dict[str, Any]:
        whole = self._whole_usage()
        usage = None if whole is None else response_usage(whole)
        items = self.items
        said = any(item.kind != "mcp_list_tools" for item in items)
        if not said and self.status in ENDED and not self._prepared:
            silent = Item("message", len(items))  # an answer without a word is still one
            silent.status = self.status if self.status == "completed" else "incomplete"
            items = [*items, silent]
        # What is to be approved is shown once it is whole.
        half = (REQUEST, "in_progress")
        output = [item.body() for item in items if (item.kind, item.status) != half]
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
        last = self.items[-1] if self.items and self._open else None
        server = self._remote.get(piece.name, "") if isinstance(piece, CallBegin) else ""
        if isinstance(piece, CallArguments) and last is not None:
            kind = last.kind
        elif isinstance(piece, CallBegin):
            kind = "mcp_call" if server else "function_call"
            kind = REQUEST if piece.name in self._asking else kind
        else:
            kind = "message" if isinstance(piece, Content) else "reasoning"
        if last is None or last.kind != kind or isinstance(piece, CallBegin):
            events += self._close("completed")
            name = piece.name if isinstance(piece, CallBegin) else ""
            last = Item(kind, len(self.items), name, server)
            last.turn = self._turns
            self.items.append(last)
            self._open = True
            events += last.begin()
        match piece:
            case Content(text) | Reasoning(text):
                events += last.more(text, scores)
            case CallArguments(_, text):
                events += last.more(text, [])
        return events

    def _close(self, status: str = "") -> list[Event]:
        """End the last item, if it is open."""
        if not self._open:
            return []
        self._open = False
        last = self.items[-1]
        if last.kind == "message":
            last.logprobs += self._held
            self._held = []
        if last.kind == REQUEST and object_in(last.text) is None:
            self.items.pop()  # nobody has been told of it
            return []
        if last.kind in CALLS and object_in(last.text) is None:
            # The model broke off, or wrote what is no JSON.
            last.error = "its arguments are no JSON object"
            return last.end("incomplete")
        if last.kind == "mcp_call":
            return [last.asked()]
        if last.kind == REQUEST:
            return last.end("completed")
        ended = self.status if self.status in ("in_progress", "completed") else "incomplete"
        return last.end(status or ended)

    def _close_calls(self) -> list[Event]:
        """End the calls that were asked for and not made."""
        events: list[Event] = []
        for item in self.items:
            if item.status == "calling":
                item.error = "it was not called, or not to its end"
                events += item.end("incomplete")
        return events

    def _whole_usage(self) -> Usage | None:
        """Of all turns; what a turn finds in the cache counts as its input."""
        if self._usage is None or self._earlier is None:
            return self._usage or self._earlier
        one, other = (msgspec.structs.astuple(u) for u in (self._usage, self._earlier))
        sums = [a + b for a, b in zip(one, other, strict=True)]
        return Usage(**dict(zip(Usage.__struct_fields__, sums, strict=True)))

    def _scores(self, delta: Delta) -> list[dict[str, Any]]:
        if not self._wants_logprobs or not delta.logprobs:
            return []
        scores: list[dict[str, Any]] = chat_logprobs(self._tokenizer, delta.logprobs)["content"]
        return scores


def conversation(
    messages: Sequence[dict[str, Any]], spoken: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages and what was said after them; an assistant that goes on is still the same one."""
    before, after = list(messages), list(spoken)
    if before and after and before[-1]["role"] == after[0]["role"] == "assistant":
        last, first = before.pop(), after.pop(0)
        calls = [*last.get("tool_calls", ()), *first.get("tool_calls", ())]
        content = last["content"] + first["content"]
        whole = {"role": "assistant", "content": content}
        before.append(whole | ({"tool_calls": calls} if calls else {}))
    return [*before, *after]


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
