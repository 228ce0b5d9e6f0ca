"""The tools that a request offers, and which of them it wants called."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from engine import InvalidRequest

MAX_TOOLS = 128
ANY_OBJECT: dict[str, Any] = {"type": "object"}
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class FunctionTool(msgspec.Struct, frozen=True):
    """A function that the client can call for the model; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The schema that a call's arguments match if they are enforced: an object's, at least."""
        return ANY_OBJECT | self.parameters

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates want it."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


class Offered(msgspec.Struct, frozen=True):
    """What may be called: `choice` is "auto", "none", "required" or a tool's name."""

    tools: Sequence[FunctionTool]
    choice: str = "auto"
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether a tool has to be called."""
        return self.choice not in ("auto", "none")

    @property
    def enforced(self) -> bool:
        """Whether calls are held to their schemas."""
        return self.forced or (self.choice == "auto" and any(tool.strict for tool in self.tools))

    @property
    def callable_tools(self) -> Sequence[FunctionTool]:
        """Those that the choice leaves."""
        named = [tool for tool in self.tools if tool.name == self.choice]
        return named or self.tools

    @property
    def names(self) -> frozenset[str]:
        """Names that are calls."""
        if self.choice == "none":
            return frozenset()
        return frozenset(tool.name for tool in self.callable_tools)


def offered_tools(
    tools: Any, choice: Any, parallel: bool | None, *, flat: bool = False
) -> Offered | None:
    """What a request's fields offer; None if nothing. `flat` is the Responses API's form, in which
    a function's fields are the tool's own. Raises InvalidRequest naming the field."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return None
    if not isinstance(tools, list):
        raise InvalidRequest("tools must be a list", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"at most {MAX_TOOLS} tools are allowed", param="tools")
    found = [_tool(tool, f"tools.[{number}]", flat) for number, tool in enumerate(tools)]
    names = [tool.name for tool in found]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InvalidRequest(f"two tools are called {name!r}", param=f"tools.[{number}]")
    chosen = _choice(choice, names, flat)
    # A tool that is named is called once, as OpenAI has it.
    return Offered(found, chosen, parallel is not False and chosen not in names)


def _tool(tool: Any, where: str, flat: bool) -> FunctionTool:
    if not isinstance(tool, dict):
        raise InvalidRequest("a tool must be an object", param=where)
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"tools of type {str(tool.get('type'))[:50]!r} are not supported by this server; "
            "functions are",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    where, fields = (where, tool) if flat else (f"{where}.function", tool.get("function"))
    if not isinstance(fields, dict):
        raise InvalidRequest("the function is missing", param=where)
    name, described = fields.get("name"), fields.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequest(
            "a function's name must be 1 to 64 letters, digits, '_', '-' or '.'",
            param=f"{where}.name",
        )
    parameters = fields.get("parameters")
    if not isinstance(parameters, dict | None):
        raise InvalidRequest("parameters must be a JSON schema", param=f"{where}.parameters")
    if not isinstance(described, str | None):
        raise InvalidRequest("description must be text", param=f"{where}.description")
    return FunctionTool(name, described or "", parameters or {}, fields.get("strict") is True)


def _choice(choice: Any, names: Sequence[str], flat: bool) -> str:
    if choice is None:
        return "auto"
    if choice in ("auto", "none", "required"):
        return str(choice)
    name = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        holder = choice if flat else choice.get("function")
        name = holder.get("name") if isinstance(holder, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            "tool_choice must be auto, none, required, or a function by its name",
            param="tool_choice",
        )
    if name not in names:
        raise InvalidRequest(
            f"tool_choice names {name[:64]!r}, which is not among the tools", param="tool_choice"
        )
    return name


def call_id() -> str:
    """A name for a call, by which its result refers to it; short enough for every template."""
    # Mistral's templates want nine letters or digits.
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(9))


def object_in(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def arguments_of(text: Any, where: str) -> dict[str, Any]:
    """A call's arguments as templates want them. Raises InvalidRequest if they are no object."""
    # Calls that were cut off before their arguments began come back as they were.
    value = object_in(text or "{}") if isinstance(text, str) else text
    if not isinstance(value, dict):
        raise InvalidRequest("a call's arguments must be a JSON object", param=where)
    return value
