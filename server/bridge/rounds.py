"""A response's tool loop: the model calls, the operator's servers answer, the model goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import msgspec

from engine import AsyncEngine, InvalidRequest, Overloaded, SamplingParams, Terms, TokenStream
from server.answering import Answering
from server.bridge.approvals import Approval, arguments_in, names_that_ask
from server.bridge.servers import RemoteError, RemoteTool, Servers, ToolCall
from server.errors import HTTPError
from server.log import Event
from server.openai import Generation
from server.response_composer import ResponseComposer, conversation

# Calls of a response if it does not say how many.
MAX_CALLS = 16
# How long a later turn waits for a place in the queue, and between two tries at least.
PATIENCE_SECONDS, LOOK_SECONDS = 60.0, 0.05


class Rounds:
    """What follows a response's first turn. `prepare` makes a conversation's prompt; it is told
    whether the model has not been asked yet, and whether it may call."""

    def __init__(
        self,
        engine: AsyncEngine,
        servers: Servers,
        tools: Sequence[RemoteTool],
        composer: ResponseComposer,
        generation: Generation,
        messages: list[dict[str, Any]],
        prepare: Callable[[list[dict[str, Any]], bool, bool], Awaitable[Answering]],
        most: int | None,
        approvals: Sequence[Approval] = (),
    ) -> None:
        self._engine = engine
        self._servers = servers
        self._where = {tool.name: tool.server for tool in tools}
        self._composer = composer
        self._generation = generation
        self._messages = messages
        self._prepare = prepare
        self._left = MAX_CALLS if most is None else most
        self._begun = time.monotonic()
        self._turns = self.calls = 0
        self.approvals = approvals
        """What the client said to earlier requests; it is taken up before the first turn."""

    async def next(
        self, request_id: str, tell: Callable[[list[Event]], None]
    ) -> TokenStream | None:
        """See `_next`; what it goes on from is kept only if it does, or may later."""
        stream, waits = None, False
        try:
            stream, waits = await self._next(request_id, tell)
        finally:
            if stream is None and not waits:
                self._engine.end_lease(self._generation.terms.lease)
        return stream

    async def _next(
        self, request_id: str, tell: Callable[[list[Event]], None]
    ) -> tuple[TokenStream | None, bool]:
        """Make the calls of the turn that has ended, and begin the next one; None if there is
        nothing to go on with, and whether the client has to do something first."""
        first = bool(self.approvals)
        if first:
            (events, calls), self.approvals = self._composer.take_up(self.approvals), ()
            waits, is_last = False, False
        else:
            events, calls, waits = self._composer.end_turn()
            is_last = waits or not calls
        tell(events)
        for call in calls:
            result, error = await self._call(call.name, call.text)
            tell(self._composer.called(call, result, error))
        if is_last:
            return None, waits
        params, left = self._generation.params, None
        if params.max_tokens is not None:
            left = params.max_tokens - self._composer.made_tokens
            if left <= 0:
                self._composer.run_out()
                return None, False
        said = conversation(self._messages, self._composer.spoken)
        answering = await self._prepare(said, first, self._left > 0)
        self._composer.next_turn(answering.parser)
        self._turns += 1
        params = answering.applied(msgspec.structs.replace(params, max_tokens=left))
        stream = await self._submitted(answering.ids, params, f"{request_id}-t{self._turns}")
        return stream, False

    def _terms(self) -> Terms:
        """Those of a later turn: what is left of its deadline, and none for its first token."""
        terms = self._generation.terms
        left = max(0.0, terms.deadline - (time.monotonic() - self._begun))
        return msgspec.structs.replace(terms, deadline=left, first_token_deadline=math.inf)

    async def _submitted(self, ids: list[int], params: SamplingParams, name: str) -> TokenStream:
        """A later turn waits out an overload, for its calls have been made."""
        patience = time.monotonic() + PATIENCE_SECONDS
        shape, names = self._generation.shape, self._generation.names
        while True:
            generation = Generation([ids], params, shape, self._terms(), names)
            try:
                return await generation.submit(self._engine, name)
            except Overloaded as error:
                wait = max(error.retry_after, LOOK_SECONDS)
                if time.monotonic() + wait > patience:
                    raise
                await anyio.sleep(wait)

    def cut(self) -> None:
        """It was cancelled while calls were made."""
        self._composer.cut()

    async def _call(self, name: str, arguments: str) -> tuple[str | None, str | None]:
        """A call's result, or what went wrong, which the model is told as well."""
        if self._left <= 0:
            return None, "no more calls are allowed (max_tool_calls); answer with what is known"
        self._left -= 1
        self.calls += 1
        begun, failed = time.monotonic(), True
        try:
            given = arguments_in(arguments)
            if given is None:
                raise RemoteError("its arguments are no JSON object that can be sent")
            result = await self._servers.call(self._where[name], name, given)
            failed = False
            return result, None
        except RemoteError as error:
            return None, str(error)
        finally:
            if self._servers.on_call is not None:
                trace, where = self._generation.terms.trace, self._where[name]
                call = ToolCall(trace, where, name, begun, time.monotonic(), failed)
                self._servers.on_call(call)


async def remote_tools(
    servers: Servers | None, asked: Sequence[dict[str, Any]]
) -> list[RemoteTool]:
    """The tools of the servers that a request names, as far as it wants them.

    Raises InvalidRequest naming the field, or HTTPError 424 if a server does not answer.
    """
    found: list[RemoteTool] = []
    labels: set[str] = set()
    for number, tool in enumerate(asked):
        where = f"tools.[{number}]"
        label, allowed = _checked(servers, tool, where)
        assert servers is not None
        if label in labels:
            raise InvalidRequest(
                f"the server {label!r} is named twice", param=f"{where}.server_label"
            )
        labels.add(label)
        try:
            offered = await servers.tools(label)
        except RemoteError as error:
            raise HTTPError(
                424, str(error), param=where, code="external_connector_error"
            ) from error
        for name in allowed or ():
            if name not in {t.name for t in offered}:
                raise InvalidRequest(
                    f"the server {label!r} has no tool {str(name)[:64]!r}",
                    param=f"{where}.allowed_tools",
                )
        asking = names_that_ask(
            tool.get("require_approval"), (t.name for t in offered), f"{where}.require_approval"
        )
        found += [
            msgspec.structs.replace(t, asks=t.name in asking)
            for t in offered
            if allowed is None or t.name in allowed
        ]
    return found


def _checked(
    servers: Servers | None, tool: dict[str, Any], where: str
) -> tuple[str, list[str] | None]:
    """A server's label, and the names of the tools that are wanted of it (None: all)."""
    for field in ("server_url", "connector_id", "headers", "authorization"):
        if tool.get(field):
            raise InvalidRequest(
                f"{field} is not taken from requests; the server's operator names servers in "
                "server.mcp_file",
                param=f"{where}.{field}",
                code="unsupported_parameter",
            )
    label = tool.get("server_label")
    known = {} if servers is None else servers.entries
    if not isinstance(label, str) or label not in known:
        names = ", ".join(known) or "none; its operator names them in server.mcp_file"
        raise InvalidRequest(
            f"server_label must be one of this server's: {names}", param=f"{where}.server_label"
        )
    allowed = tool.get("allowed_tools")
    if isinstance(allowed, dict) and set(allowed) == {"tool_names"}:
        allowed = allowed["tool_names"]
    listed = isinstance(allowed, list) and all(isinstance(name, str) for name in allowed)
    if allowed is not None and not listed:
        raise InvalidRequest(
            "allowed_tools must be a list of names", param=f"{where}.allowed_tools"
        )
    return label, allowed
