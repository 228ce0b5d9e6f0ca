"""The items of a response's output, and the events that tell of them."""

from __future__ import annotations

import uuid
from typing import Any

from server.log import Event
from server.tools import call_id

PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "reasoning": "rs",
    "mcp_call": "mcp",
    "mcp_list_tools": "mcpl",
    "mcp_approval_request": "mcpr",
}
CALLS = ("function_call", "mcp_call")


class Item:
    """One output item: a message, reasoning, a call, a request to approve one, or a server's tools.
    `text` is its content or arguments; `server` the label of whom a call is for, `approval` the id
    of the request by which it was approved, `result` and `error` what came back."""

    def __init__(self, kind: str, place: int, name: str = "", server: str = "") -> None:
        prefix = PREFIXES[kind]
        self.server = server
        self.tools: list[dict[str, Any]] = []
        self.approval: str | None = None
        self.result: str | None = None
        self.error: str | None = None
        self.turn = 0
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
        if self.kind == "mcp_call":
            said = {"name": self.name, "arguments": self.text, "server_label": self.server}
            came = {"output": self.result, "error": self.error}
            return body | said | came | {"approval_request_id": self.approval}
        if self.kind == "mcp_approval_request":
            del body["status"]
            said = {"name": self.name, "arguments": self.text, "server_label": self.server}
            return body | said
        if self.kind == "mcp_list_tools":
            del body["status"]
            return body | {"server_label": self.server, "tools": self.tools, "error": None}
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": self.text}]
            return body | {"summary": [], "content": content}
        return body | {"role": "assistant", "content": [self._part()]}

    def begin(self) -> list[Event]:
        """What tells of its beginning."""
        if self.kind == "mcp_approval_request":
            return []  # nobody can say anything to it before it is whole
        empty: dict[str, Any] = {"content": []} if self.kind in ("message", "reasoning") else {}
        item = self.body() | empty
        added = {"type": "response.output_item.added", "output_index": self._place, "item": item}
        if self.kind in ("mcp_call", "mcp_list_tools"):
            return [added, self._event(f"{self.kind}.in_progress")]
        if self.kind != "message":
            return [added]
        return [added, self._event("content_part.added", part=self._part())]

    def more(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        """What tells of more text."""
        self.text += text
        self.logprobs += logprobs
        if self.kind == "mcp_approval_request":
            return []
        if self.kind in CALLS:
            return [self._event(f"{self.kind}_arguments.delta", delta=text)]
        if self.kind == "reasoning":
            return [self._event("reasoning_text.delta", delta=text)]
        return [self._event("output_text.delta", delta=text, logprobs=logprobs)]

    def end(self, status: str) -> list[Event]:
        """What tells of its end."""
        failed = self.kind == "mcp_call" and self.error is not None
        self.status = "failed" if failed and status == "completed" else status
        done = {
            "type": "response.output_item.done",
            "output_index": self._place,
            "item": self.body(),
        }
        if self.kind == "mcp_approval_request":
            return [{**done, "type": "response.output_item.added"}, done]
        if self.kind in ("mcp_call", "mcp_list_tools"):
            return [self._event(f"{self.kind}.{'failed' if failed else 'completed'}"), done]
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

    def asked(self) -> Event:
        """What tells that a call for a server is complete, and is being made."""
        self.status = "calling"
        return self._event("mcp_call_arguments.done", arguments=self.text)

    def _part(self) -> dict[str, Any]:
        scores = [*self.logprobs]
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": scores}

    def _event(self, kind: str, **more: Any) -> Event:
        where: dict[str, Any] = {"item_id": self.id, "output_index": self._place}
        if self.kind in ("message", "reasoning"):
            where["content_index"] = 0
        return {"type": f"response.{kind}", **where, **more}
