"""Calls that are made only once the client has approved them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from engine import InvalidRequest
from server.bridge.servers import RemoteTool
from server.tools import object_in

REQUEST, RESPONSE = "mcp_approval_request", "mcp_approval_response"
MOST_REASON = 1000


class Approval(msgspec.Struct, frozen=True):
    """What the client said to a request; `refusal` is what the model is told if it said no."""

    request_id: str
    server: str
    name: str
    arguments: str
    refusal: str | None


def names_that_ask(rule: Any, names: Iterable[str], where: str) -> frozenset[str]:
    """Which of a server's tools need an approval, as `require_approval` says; all if it says
    nothing. Raises InvalidRequest naming the field."""
    if rule == "never":
        return frozenset()
    if rule in (None, "always"):
        return frozenset(names)
    if not isinstance(rule, dict) or not rule or not set(rule) <= {"always", "never"}:
        raise InvalidRequest(
            "require_approval must be 'always', 'never', or an object of them with tool_names",
            param=where,
        )
    known = frozenset(names)
    listed = {choice: _tool_names(v, f"{where}.{choice}", known) for choice, v in rule.items()}
    if "never" in listed:
        return known - (listed["never"] - listed.get("always", frozenset()))
    return listed["always"]


def approvals_of(
    given: Any, earlier: Sequence[Mapping[str, Any]], tools: Sequence[RemoteTool]
) -> list[Approval]:
    """The approvals among a request's input, for what was asked in it or in the `earlier` output.
    Raises InvalidRequest naming the item."""
    items = given if isinstance(given, list) else []
    asked = {
        item["id"]: item
        for item in [*earlier, *items]
        if item.get("type") == REQUEST and isinstance(item.get("id"), str)
    }
    # Clients that store nothing send all that came before again, calls that were made among it.
    made = [item.get("approval_request_id") for item in items if item.get("type") == "mcp_call"]
    offered = {(tool.server, tool.name) for tool in tools}
    found: dict[str, Approval] = {}
    for number, item in enumerate(items):
        if item.get("type") != RESPONSE or item.get("approval_request_id") in made:
            continue
        where, identifier = f"input.[{number}]", item.get("approval_request_id")
        request = asked.get(identifier) if isinstance(identifier, str) else None
        if not isinstance(identifier, str) or request is None:
            raise InvalidRequest(
                "approval_request_id must be that of a request in the input, or in the previous "
                "response",
                param=f"{where}.approval_request_id",
            )
        if identifier in found:
            raise InvalidRequest(f"{identifier} is answered twice", param=where)
        if not isinstance(item.get("approve"), bool):
            raise InvalidRequest("approve must be true or false", param=f"{where}.approve")
        call = _asked(request, where)
        if call not in offered:
            raise InvalidRequest(
                f"the tool {call[1][:64]!r} of {call[0][:64]!r} is not among this request's tools",
                param="tools",
            )
        found[identifier] = Approval(
            identifier, *call, request["arguments"], None if item["approve"] else _refusal(item)
        )
    return list(found.values())


def _asked(request: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The server and tool of a request, which a client may have sent back by itself."""
    server, name, arguments = (request.get(k) for k in ("server_label", "name", "arguments"))
    whole = isinstance(arguments, str) and arguments_in(arguments) is not None
    if not isinstance(server, str) or not isinstance(name, str) or not whole:
        raise InvalidRequest(
            "an approval request needs a server_label, a name, and an object of arguments",
            param=where,
        )
    return server, name


def arguments_in(text: str) -> dict[str, Any] | None:
    """A call's arguments; None if they are no object that can be sent."""
    value = object_in(text)
    try:
        msgspec.json.encode(value)  # not with half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return value


def _refusal(item: Mapping[str, Any]) -> str:
    reason = item.get("reason")
    more = f": {reason[:MOST_REASON]}" if isinstance(reason, str) and reason else ""
    return f"the user did not approve this call{more}"


def _tool_names(value: Any, where: str, known: frozenset[str]) -> frozenset[str]:
    names = value.get("tool_names") if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidRequest("it must be an object with tool_names, a list", param=where)
    if unknown := sorted(set(names) - known):
        raise InvalidRequest(f"the server has no tool {unknown[0][:64]!r}", param=where)
    return frozenset(names)
