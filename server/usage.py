"""What each answer took in tokens, also when it was cancelled or its client left; by its id."""

from __future__ import annotations

from collections import OrderedDict

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from engine import RequestStats, StepStats, Usage
from server.errors import HTTPError, json_response
from server.format import usage_body
from server.tenants import client_of

# Answers whose usage is kept.
KEPT = 10_000


class Entry(msgspec.Struct):
    """One answer: its tenant, and the usage of each of its prompts."""

    tenant: str
    usages: list[Usage]
    finish_reason: str


class UsageBook:
    """A listener of one engine; the oldest entries are forgotten first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def on_step(self, stats: StepStats) -> None:
        """Steps do not matter here."""

    def on_request(self, stats: RequestStats) -> None:
        """Take one finished request's statistics; an answer's further prompts count with it."""
        usage = Usage(
            prompt_tokens=stats.prompt_tokens,
            completion_tokens=stats.completion_tokens,
            cached_tokens=stats.cached_tokens,
        )
        entry = self._entries.get(answer_id(stats.id))
        if entry is not None:
            entry.usages.append(usage)
            return
        entry = Entry(stats.tenant, [usage], stats.finish_reason)
        self._entries[answer_id(stats.id)] = entry
        if len(self._entries) > KEPT:
            self._entries.popitem(last=False)

    def find(self, identifier: str, tenant: str) -> Entry | None:
        """An answer of this tenant's."""
        entry = self._entries.get(identifier)
        return entry if entry is not None and entry.tenant == tenant else None


def answer_id(request_id: str) -> str:
    """The answer that one of its prompts' requests belongs to: `cmpl-HEX-3` is of `cmpl-HEX`."""
    kind, dash, rest = request_id.partition("-")
    return kind + dash + rest.partition("-")[0]


async def get_usage(request: Request) -> ASGIApp:
    """`GET /v1/usage/{id}`: of an answer that has ended, however it ended."""
    identifier = request.path_params["id"]
    entry = request.app.state.usage.find(identifier, client_of(request).tenant)
    if entry is None:
        raise HTTPError(
            404, f"no finished answer {identifier[:100]!r} is known", param="id", code="not_found"
        )
    reason = {"abort": "cancelled"}.get(entry.finish_reason, entry.finish_reason)
    body = {
        "id": identifier,
        "object": "usage",
        "finish_reason": reason,
        "usage": usage_body(entry.usages),
    }
    return json_response(body)
