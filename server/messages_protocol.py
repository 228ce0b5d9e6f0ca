"""The body of Anthropic's Messages API: its fields, and the conversation that it asks to go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine import Grammar, InvalidRequest
from server.answering import Wishes, effort_of
from server.protocol import Harmless, Sampled
from server.tools import Offered, offered_tools


class Turn(msgspec.Struct, frozen=True):
    """One message of the conversation."""

    role: str
    content: str | list[dict[str, Any]]


class CountRequest(Sampled, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: list[Turn]
    system: str | list[dict[str, Any]] | None = None
    thinking: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    # Refused unless they change nothing.
    mcp_servers: Any = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    # Every prompt is cached as far as it has been seen.
    cache_control: Any = None
    # Refused unless they change nothing.
    container: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


HARMLESS: Harmless = {
    "mcp_servers": ([],),
    "container": (),
    "context_management": ({},),
    "diagnostics": (),
    "inference_geo": (),
    "speed": ("standard",),
    "user_profile_id": (),
    "workspace_id": (),
    "service_tier": ("auto", "standard_only"),
    "stop": ([],),
    "n": (1,),
}


def wishes_of(body: CountRequest) -> Wishes:
    """What a request wants of its answer. Raises InvalidRequest naming the field."""
    effort, budget = _thinking(body.thinking)
    settings = body.output_config or {}
    for name, value in settings.items():
        if name not in ("effort", "format") and value is not None:
            raise _unsupported(f"output_config.{name[:50]}")
    asked = settings.get("effort")
    if effort is None and asked is not None:
        # Its highest level has another name here.
        effort = effort_of("xhigh" if asked == "max" else asked, "output_config.effort")
    form = settings.get("format")
    field = "output_format" if form is None else "output_config.format"
    return Wishes(
        offered=_offered(body.tools, body.tool_choice),
        form=_form(body.output_format if form is None else form, field),
        effort=effort,
        effort_field="thinking" if body.thinking else "output_config.effort",
        budget=budget,
        budget_field="thinking",
    )


def template_messages(body: CountRequest) -> list[dict[str, Any]]:
    """The conversation as chat templates want it: results of tools are messages of their own.
    Raises InvalidRequest naming the message."""
    if not body.messages:
        raise InvalidRequest("messages is empty; give at least one", param="messages")
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    calls: set[str] = set()
    for number, turn in enumerate(body.messages):
        where = f"messages.{number}"
        if turn.role == "assistant":
            messages.append(_assistant(turn.content, where, calls))
        elif turn.role == "user":
            messages += _user(turn.content, where, calls)
        else:
            raise InvalidRequest(
                "role must be user or assistant; a system prompt goes into system",
                param=f"{where}.role",
            )
    return _joined(messages)


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of one role that follow each other are one."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            joined.append(message)
            continue
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        texts = [text for text in (last["content"], message["content"]) if text]
        whole = {"role": message["role"], "content": "\n".join(texts)}
        joined[-1] = whole | ({"tool_calls": calls} if calls else {})
    return joined


def _assistant(content: str | list[dict[str, Any]], where: str, calls: set[str]) -> dict[str, Any]:
    blocks = content if isinstance(content, list) else []
    made = []
    for block in blocks:
        if block.get("type") == "tool_use":
            identifier, name, given = (block.get(key) for key in ("id", "name", "input"))
            if not (isinstance(identifier, str) and isinstance(name, str)) or not isinstance(
                given, dict
            ):
                raise InvalidRequest("a tool_use needs an id, a name and an input", param=where)
            calls.add(identifier)
            function = {"name": name, "arguments": given}
            made.append({"id": identifier, "type": "function", "function": function})
    # What the model thought in an earlier turn is not shown to it again.
    other = ("tool_use", "thinking", "redacted_thinking")
    kept = [b for b in blocks if b.get("type") not in other]
    text = _text(kept if isinstance(content, list) else content, f"{where}.content")
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


def _user(content: str | list[dict[str, Any]], where: str, calls: set[str]) -> list[dict[str, Any]]:
    blocks = content if isinstance(content, list) else []
    messages: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            identifier = block.get("tool_use_id")
            if not isinstance(identifier, str) or identifier not in calls:
                raise InvalidRequest(
                    f"no tool_use before it has the id {str(identifier)[:64]!r}", param=where
                )
            told = _text(block.get("content") or "", f"{where}.content")
            told = f"error: {told}" if block.get("is_error") else told
            messages.append({"role": "tool", "tool_call_id": identifier, "content": told})
    kept = [b for b in blocks if b.get("type") != "tool_result"]
    if kept or not messages:
        text = _text(kept if isinstance(content, list) else content, f"{where}.content")
        messages.append({"role": "user", "content": text})
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [{}]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequest(
                f"content blocks of type {str(kind)[:50]!r} are not supported by this server; "
                "text, tool_use and tool_result are",
                param=where,
            )
        texts.append(block["text"])
    return "".join(texts)


def _offered(
    tools: Sequence[dict[str, Any]] | None, choice: dict[str, Any] | None
) -> Offered | None:
    """Its form of tools and their choice in OpenAI's, which everything else speaks."""
    functions = []
    for number, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            raise _unsupported(f"tools.[{number}].type")
        fields = {key: tool.get(key) for key in ("name", "description", "strict")}
        functions.append({"type": "function", "parameters": tool.get("input_schema"), **fields})
    choice = choice or {}
    kind = choice.get("type")
    kinds = {None: None, "auto": "auto", "none": "none", "any": "required"}
    if kind == "tool":
        wanted: Any = {"type": "function", "name": choice.get("name")}
    elif isinstance(kind, str | None) and kind in kinds:
        wanted = kinds[kind]
    else:
        raise InvalidRequest(
            "tool_choice.type must be auto, any, tool or none", param="tool_choice.type"
        )
    parallel = not choice.get("disable_parallel_tool_use")
    try:
        return offered_tools(functions, wanted, parallel, flat=True)
    except InvalidRequest as error:
        raise renamed(error) from error


def renamed(error: InvalidRequest) -> InvalidRequest:
    """An error about a tool's parameters under this API's name for them."""
    param = error.param or ""
    for ours in (".function.parameters", ".parameters"):
        param = param.replace(ours, ".input_schema")
    return InvalidRequest(str(error), param=param or None, code=error.code)


def _thinking(given: dict[str, Any] | None) -> tuple[str | None, int | None]:
    """The effort and the budget that it stands for; without it a model does as it is used to."""
    if given is None or given.get("type") == "adaptive":
        return None, None
    kind, budget = given.get("type"), given.get("budget_tokens")
    if kind == "disabled":
        return "none", None
    if kind != "enabled" or not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise InvalidRequest(
            "thinking must be disabled, adaptive, or enabled with budget_tokens of at least 1",
            param="thinking",
        )
    return None, budget


def _form(given: Any, where: str) -> tuple[Grammar, str] | None:
    """The schema that the answer has to match."""
    if given is None:
        return None
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict) or given.get("type") != "json_schema":
        raise InvalidRequest("it must be of type json_schema, with a schema", param=where)
    return Grammar.json_schema(schema), f"{where}.schema"


def _unsupported(where: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where} is not supported by this server; leave it out",
        param=where,
        code="unsupported_parameter",
    )
