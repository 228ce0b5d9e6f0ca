"""Anthropic's Messages API: the same generation under its names, for Claude-style clients."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from engine import AsyncEngine, Delta, InvalidRequest, SamplingParams, TokenStream, Usage
from server.answering import encode_chat
from server.errors import json_response, messages_error
from server.openai import Generation, check_model, read_body, ready_engine
from server.protocol import Harmless, Sampled
from server.requests import sampling_fields, terms_of, truncated
from server.shapes import ChatShape
from server.streams import EventStream, deltas_of, race_disconnect
from server.tenants import client_of


class Turn(msgspec.Struct, frozen=True):
    """One message of the conversation."""

    role: str
    content: str | list[dict[str, Any]]


class CountRequest(Sampled, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: list[Turn]
    system: str | list[dict[str, Any]] | None = None
    # Refused unless they change nothing.
    thinking: Any = None
    tools: Any = None
    tool_choice: Any = None
    mcp_servers: Any = None
    output_config: Any = None


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
    "thinking": ({"type": "disabled"},),
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "mcp_servers": ([],),
    "output_config": ({},),
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


async def create(request: Request) -> ASGIApp:
    """`POST /v1/messages`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, MessagesRequest, HARMLESS)
    check_model(engine, body.model)
    ids = await _prompt(engine, body)
    stop = tuple(body.stop_sequences or ())
    params = SamplingParams(**sampling_fields(body) | {"stop": stop, "max_tokens": body.max_tokens})
    identifier = f"msg_{uuid.uuid4().hex}"
    generation = Generation(
        [ids],
        params,
        ChatShape(engine.parts.tokenizer, logprobs=False),
        terms_of(client_of(request), body),
        {"prompt": "messages", "stop": "stop_sequences"},
    )
    stream = await generation.submit(engine, identifier)
    if body.stream:
        return EventStream(
            _events(engine, stream, identifier, len(ids)),
            headers,
            lambda: engine.abort(*stream.request_ids),
            settings=request.app.state.settings,
            raw=True,
            failed=lambda error: _frame("error", messages_error(error)[1]),
        )
    whole = await race_disconnect(request, lambda: _whole(engine, stream))
    answer = _message(engine, identifier, whole, whole.usage or _empty(len(ids)))
    return json_response(answer, headers=headers)


async def count_tokens(request: Request) -> ASGIApp:
    """`POST /v1/messages/count_tokens`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, CountRequest, HARMLESS)
    check_model(engine, body.model)
    return json_response({"input_tokens": len(await _prompt(engine, body))}, headers=headers)


async def _prompt(engine: AsyncEngine, body: CountRequest) -> list[int]:
    """The prompt's ids; a last message of the assistant's is gone on with."""
    if not body.messages:
        raise InvalidRequest("messages is empty; give at least one", param="messages")
    messages = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for number, turn in enumerate(body.messages):
        if turn.role not in ("user", "assistant"):
            raise InvalidRequest(
                "role must be user or assistant; a system prompt goes into system",
                param=f"messages.{number}.role",
            )
        text = _text(turn.content, f"messages.{number}.content")
        messages.append({"role": turn.role, "content": text})
    options = {"continue_final": True} if messages[-1]["role"] == "assistant" else {}
    _, ids = await encode_chat(engine, messages, "messages", **options)
    return truncated(ids, body)


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequest(
                f"content blocks of type {str(block.get('type'))[:50]!r} are not supported by "
                "this server; only text is",
                param=where,
            )
        texts.append(block["text"])
    return "".join(texts)


async def _whole(engine: AsyncEngine, stream: TokenStream) -> Delta:
    whole = Delta()
    async with aclosing(deltas_of(engine, stream)) as batches:
        async for batch in batches:
            for delta in batch:
                whole.merge(delta)
    return whole


async def _events(
    engine: AsyncEngine, stream: TokenStream, identifier: str, prompt_tokens: int
) -> AsyncGenerator[bytes]:
    """Anthropic's events of one message of text."""
    begun = _message(engine, identifier, Delta(), _empty(prompt_tokens))
    yield _frame("message_start", {"message": begun | {"content": []}})
    block = {"index": 0, "content_block": {"type": "text", "text": ""}}
    yield _frame("content_block_start", block)
    yield _frame("ping", {})
    last = Delta()
    async with aclosing(deltas_of(engine, stream)) as batches:
        async for batch in batches:
            for delta in batch:
                if delta.text:
                    text = {"type": "text_delta", "text": delta.text}
                    yield _frame("content_block_delta", {"index": 0, "delta": text})
                last = delta
    yield _frame("content_block_stop", {"index": 0})
    usage = _usage(last.usage or _empty(prompt_tokens))
    yield _frame("message_delta", {"delta": _stop(last), "usage": usage})
    yield _frame("message_stop", {})


def _frame(kind: str, body: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | body))


def _message(engine: AsyncEngine, identifier: str, delta: Delta, usage: Usage) -> dict[str, Any]:
    return {
        "id": identifier,
        "type": "message",
        "role": "assistant",
        "model": engine.parts.model_name,
        "content": [{"type": "text", "text": delta.text}],
        **_stop(delta),
        "usage": _usage(usage),
    }


def _stop(delta: Delta) -> dict[str, Any]:
    """Why it ended: a stop sequence is named."""
    sequence = delta.stop_reason if isinstance(delta.stop_reason, str) else None
    reasons = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}
    reason = "stop_sequence" if sequence else reasons.get(delta.finish_reason or "")
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens that were found in the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _empty(prompt_tokens: int) -> Usage:
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=0)
