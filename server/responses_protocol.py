"""The body of OpenAI's Responses API: its fields, and the conversation that it asks to go on."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec

from engine import AsyncEngine, InvalidRequest, SamplingParams, TokenStream
from engine.scheduling.admission import check_length
from server.answering import Answering, Wishes, effort_of, prepare_answer
from server.bridge.approvals import REQUEST, RESPONSE, approvals_of
from server.bridge.rounds import Rounds, remote_tools
from server.bridge.servers import RemoteTool, Servers
from server.openai import Generation, check_model
from server.protocol import Harmless, Sampled
from server.requests import check_results, sampling_fields, terms_of, truncated
from server.response_composer import ResponseComposer, input_message
from server.shapes import ChatShape
from server.store import Record
from server.structured import text_format
from server.tenants import Client
from server.tools import arguments_of, offered_tools

MAX_METADATA = 16
ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text")


class ResponsesRequest(Sampled, frozen=True, kw_only=True):
    """`POST /v1/responses`, and `response.create` on a WebSocket."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: str | None = None
    truncation: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    stream_options: Any = None
    generate: bool | None = None
    # Refused: chat's names for what has another one here.
    max_tokens: Any = None
    max_completion_tokens: Any = None
    messages: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    text: Any = None
    reasoning: Any = None
    max_tool_calls: int | None = None
    # Refused unless they change nothing.
    prompt: Any = None
    conversation: Any = None
    context_management: Any = None
    background_options: Any = None
    access_programs: Any = None
    image: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


HARMLESS: Harmless = {
    "prompt": (),
    "conversation": (),
    "context_management": ([],),
    "background_options": ({}, {"completion_window": "soonest"}),
    "access_programs": (),
    "image": (),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "truncation": ("disabled",),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "max_tokens": (),
    "max_completion_tokens": (),
    "messages": (),
    "response_format": (),
}
# What may be asked to be included; the others exist only with tools, images or reasoning.
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")


async def prepare_response(
    engine: AsyncEngine,
    body: ResponsesRequest,
    client: Client,
    previous: Record | None,
    *,
    resumable: bool = False,
    servers: Servers | None = None,
) -> tuple[Record, Generation]:
    """Check a request and make its prompt: instructions, what was said before, and the input. With
    `servers` their tools can be asked for.

    Raises InvalidRequest naming the field, or HTTPError.
    """
    check_model(engine, body.model)
    _check(body)
    wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    given = messages_of(body.input)
    messages = [*(previous.conversation if previous is not None else []), *given]
    remote = await tools_of_servers(servers, body)
    earlier = previous.composer.snapshot()["output"] if previous is not None else []
    approvals = approvals_of(body.input, earlier, remote)
    answering = await prompt_of(engine, messages, body, remote)
    ids = truncated(answering.ids, body)
    asked = SamplingParams(
        **sampling_fields(body, engine.parts.recommended),
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
    )
    params = answering.applied(asked)
    if body.generate is False or approvals:
        # What is not submitted, or only after calls, is checked here.
        params.validate(engine.parts.vocab_size)
        check_length(len(ids), params.max_tokens, engine.parts.limits)
    identifier = f"resp_{uuid.uuid4().hex}"
    tokenizer = engine.parts.tokenizer
    composer = ResponseComposer(
        identifier,
        _settings(engine, body, asked),
        tokenizer,
        logprobs=wants_logprobs,
        parser=answering.parser,
        remote={tool.name: tool.server for tool in remote},
        asking={tool.name for tool in remote if tool.asks},
    )
    for label in dict.fromkeys(tool.server for tool in remote):
        composer.list_tools(label, [_shown(tool) for tool in remote if tool.server == label])
    record = Record(
        id=identifier,
        owner=client.owner,
        composer=composer,
        resumable=resumable or bool(body.store),
        background=bool(body.background),
        kept=body.store is not False,
        messages=messages,
        items=_listed(body.input),
        settings=body,
    )
    names = {
        "prompt": "input",
        "logprobs": "top_logprobs",
        "max_tokens": "max_output_tokens",
        **answering.names,
    }
    shape = ChatShape(tokenizer, logprobs=wants_logprobs)
    terms = terms_of(client, body)
    if remote:
        # Its calls come back to what it has computed.
        terms = msgspec.structs.replace(terms, lease=identifier)
    generation = Generation([ids], params, shape, terms, names)
    if remote and servers is not None:

        def prepare(
            conversation: list[dict[str, Any]], first: bool, may_call: bool
        ) -> Awaitable[Answering]:
            # Only the first turn can be made to call.
            wanted = body.tool_choice if first or body.tool_choice == "none" else "auto"
            choice = wanted if may_call else "none"
            free = msgspec.structs.replace(body, tool_choice=choice)
            return prompt_of(engine, conversation, free, remote)

        record.rounds = Rounds(
            engine,
            servers,
            remote,
            composer,
            msgspec.structs.replace(generation, params=asked),
            messages,
            prepare,
            body.max_tool_calls,
            approvals,
        )
    return record, generation


async def submit(engine: AsyncEngine, record: Record, generation: Generation) -> TokenStream | None:
    """Queue a response's first turn; None if calls come before it, which `Record.rounds` makes."""
    if isinstance(record.rounds, Rounds) and record.rounds.approvals:
        # Nothing is called for who would be refused then.
        engine.check_open(record.id)
        now, tokens = engine.parts.clock.now(), len(generation.prompts[0])
        engine.admission.check_room(
            generation.terms.tenant, 1, tokens, now, patient=generation.terms.is_patient
        )
        return None
    return await generation.submit(engine, record.id)


async def tools_of_servers(servers: Servers | None, body: ResponsesRequest) -> list[RemoteTool]:
    """What a request wants to be called of the operator's servers. Raises InvalidRequest naming the
    field, or HTTPError 424."""
    every = body.tools if isinstance(body.tools, list) else []
    named = [t for t in every if isinstance(t, dict) and t.get("type") == "mcp"]
    return await remote_tools(servers, named)


def _shown(tool: RemoteTool) -> dict[str, Any]:
    """A server's tool as it is listed."""
    shown = {"name": tool.name, "description": tool.description, "annotations": None}
    return shown | {"input_schema": tool.parameters}


async def prompt_of(
    engine: AsyncEngine,
    messages: list[dict[str, Any]],
    body: ResponsesRequest,
    remote: Sequence[RemoteTool] = (),
) -> Answering:
    """The prompt of a conversation, and what belongs to its answer, which may call `remote` tools.
    Raises InvalidRequest if nothing was said."""
    if not messages:
        raise InvalidRequest("input is missing; give text or a list of messages", param="input")
    check_results(messages, "input")
    first = body.instructions
    system = [{"role": "system", "content": first}] if first else []
    wishes = wishes_of(body, remote)
    return await prepare_answer(engine, [*system, *messages], wishes, name="input")


def wishes_of(body: ResponsesRequest, remote: Sequence[RemoteTool] = ()) -> Wishes:
    """What a request wants of its answer. Raises InvalidRequest naming the field."""
    reasoning = body.reasoning or {}
    if not isinstance(reasoning, dict):
        raise InvalidRequest("reasoning must be an object", param="reasoning")
    for name, value in reasoning.items():
        if name != "effort" and value is not None:
            raise InvalidRequest(
                f"reasoning.{name[:50]} is not supported by this server; leave it out",
                param=f"reasoning.{name[:50]}",
                code="unsupported_parameter",
            )
    if isinstance(body.text, dict) and body.text.get("verbosity") not in (None, "medium"):
        raise InvalidRequest(
            "text.verbosity is not supported by this server; leave it out",
            param="text.verbosity",
            code="unsupported_parameter",
        )
    if body.max_tool_calls is not None and not 1 <= body.max_tool_calls <= 1000:
        raise InvalidRequest("max_tool_calls must be between 1 and 1000", param="max_tool_calls")
    tools = body.tools
    if isinstance(tools, list):
        # Those of servers are offered by their own names.
        tools = [t for t in tools if not (isinstance(t, dict) and t.get("type") == "mcp")]
        tools += [_function(tool) for tool in remote]
    return Wishes(
        offered=offered_tools(tools, body.tool_choice, body.parallel_tool_calls, flat=True),
        form=text_format(body.text),
        effort=effort_of(reasoning.get("effort"), "reasoning.effort"),
        effort_field="reasoning.effort",
    )


def _function(tool: RemoteTool) -> dict[str, Any]:
    """A server's tool as the model is shown it."""
    said = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", **said}


def messages_of(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """A request's input as chat templates want it: calls join their assistant's message."""
    if given is None:
        return []
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        where, kind = f"input.[{number}]", item.get("type", "message")
        if kind == "function_call":
            call = _call(item, where)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append(_result(item, where))
        elif kind == "mcp_call":
            # What was called for an earlier answer, and what came back.
            call = _call({**item, "call_id": item.get("id")}, where)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
            told = item.get("output") or item.get("error") or ""
            messages.append(_result({"call_id": item.get("id"), "output": told}, where))
        elif kind in ("reasoning", "mcp_list_tools", REQUEST, RESPONSE):
            # What the model thought in an earlier turn is not shown to it again, and a request only
            # with what came of it.
            continue
        else:
            messages.append(_message(item, where))
    return messages


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    name, identifier = item.get("name"), item.get("call_id")
    if not isinstance(name, str) or not isinstance(identifier, str):
        raise InvalidRequest("a call needs a name and a call_id", param=where)
    arguments = arguments_of(item.get("arguments"), f"{where}.arguments")
    function = {"name": name, "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def _result(item: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(item.get("call_id"), str):
        raise InvalidRequest("a call's output needs its call_id", param=f"{where}.call_id")
    output = _text(item.get("output"), f"{where}.output")
    return {"role": "tool", "tool_call_id": item["call_id"], "content": output}


def _listed(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """A request's input as it is listed."""
    items = []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given or []:
        if item.get("type", "message") == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            items.append(input_message(role, _text(item["content"], "input")))
        else:
            items.append({"id": f"item_{uuid.uuid4().hex}", **item})
    return items


def steering_messages(given: Any) -> list[dict[str, Any]]:
    """The input of a steer: text, or messages of the user's."""
    if not isinstance(given, (str, list)) or not given:
        raise InvalidRequest("input must be text or a list of messages, and not empty")
    if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
        raise InvalidRequest("input must be a list of messages")
    messages = messages_of(given)
    if any(message["role"] != "user" for message in messages):
        raise InvalidRequest("only messages of role 'user' can steer a response")
    return messages


def _message(item: dict[str, Any], where: str) -> dict[str, str]:
    kind = item.get("type", "message")
    if kind != "message":
        raise InvalidRequest(
            f"input items of type {str(kind)[:50]!r} are not supported by this server; messages, "
            "function calls and their outputs are",
            param=where,
            code="unsupported_parameter",
        )
    role = item.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    text = _text(item.get("content"), f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": text}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("content must be text or a list of parts", param=where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in TEXTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise InvalidRequest(
                f"content parts of type {str(kind)[:50]!r} are not supported; only text is",
                param=where,
            )
    return "".join(texts)


def _check(body: ResponsesRequest) -> None:
    """What the fields' types do not say."""
    for name in body.include or ():
        if name not in INCLUDABLE:
            raise InvalidRequest(
                f"{name[:100]!r} cannot be included by this server",
                param="include",
                code="unsupported_parameter",
            )
    metadata = body.metadata or {}
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(f"metadata holds more than {MAX_METADATA} keys", param="metadata")
    if any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise InvalidRequest(
            "metadata has a key of more than 64 characters, or a value of more than 512",
            param="metadata",
        )
    if body.background and body.store is False:
        raise InvalidRequest("background needs store; leave store out", param="store")
    if body.n not in (None, 1):
        raise InvalidRequest("a response has one answer; leave n out", param="n")


def _settings(engine: AsyncEngine, body: ResponsesRequest, asked: SamplingParams) -> dict[str, Any]:
    """The request's fields as the response object repeats them."""
    return {
        "model": engine.parts.model_name,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "metadata": body.metadata or {},
        "background": bool(body.background),
        "store": body.store is not False,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "text": {"format": {"type": "text"}, **{k: v for k, v in (body.text or {}).items() if v}},
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "truncation": "disabled",
        "service_tier": "default",
        "user": body.user,
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
    }


def successor_of(body: ResponsesRequest, identifier: str, given: Any) -> ResponsesRequest:
    """The request that goes on from a response that was steered."""
    return msgspec.structs.replace(body, input=given, previous_response_id=identifier)
