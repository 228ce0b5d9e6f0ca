"""Anthropic's Messages API: the same generation under its names, for Claude-style clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from engine import AsyncEngine, InvalidRequest, SamplingParams, TokenStream
from server.answering import Answering, prepare_answer
from server.errors import json_response, messages_error
from server.message_composer import MessageComposer
from server.messages_protocol import (
    HARMLESS,
    CountRequest,
    MessagesRequest,
    renamed,
    template_messages,
    wishes_of,
)
from server.openai import Generation, check_model, read_body, ready_engine
from server.requests import sampling_fields, terms_of, truncated
from server.shapes import ChatShape
from server.streams import EventStream, Put, completed, race_disconnect, reading
from server.tenants import client_of


async def create(request: Request) -> ASGIApp:
    """`POST /v1/messages`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, MessagesRequest, HARMLESS)
    check_model(engine, body.model)
    answering = await _answering(engine, body)
    ids = truncated(answering.ids, body)
    stop = tuple(body.stop_sequences or ())
    fields = sampling_fields(body, engine.parts.recommended)
    params = SamplingParams(**fields | {"stop": stop, "max_tokens": body.max_tokens})
    identifier = f"msg_{uuid.uuid4().hex}"
    generation = Generation(
        [ids],
        answering.applied(params),
        ChatShape(engine.parts.tokenizer, logprobs=False),
        terms_of(client_of(request), body),
        {**answering.names, "prompt": "messages", "stop": "stop_sequences"},
    )
    stream = await generation.submit(engine, identifier)
    model = engine.parts.model_name
    composer = MessageComposer(identifier, model, len(ids), answering.parser)
    if body.stream:

        async def produce(put: Put) -> None:
            await completed(put(_frames(composer.begin())))
            with reading(engine, stream):
                await stream.pour(
                    lambda deltas: put(b"".join(_frames(composer.delta(delta)) for delta in deltas))
                )
            await completed(put(_frames(composer.end())))

        return EventStream(
            produce,
            headers,
            lambda: engine.abort(*stream.request_ids),
            settings=request.app.state.settings,
            failed=lambda error: _frame(messages_error(error)[1]),
        )
    await race_disconnect(request, lambda: _drain(engine, stream, composer))
    return json_response(composer.body(), headers=headers)


async def count_tokens(request: Request) -> ASGIApp:
    """`POST /v1/messages/count_tokens`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, CountRequest, HARMLESS)
    check_model(engine, body.model)
    ids = truncated((await _answering(engine, body)).ids, body)
    return json_response({"input_tokens": len(ids)}, headers=headers)


async def _answering(engine: AsyncEngine, body: CountRequest) -> Answering:
    """The prompt, and what belongs to its answer; a last message of the assistant's is gone on
    with."""
    messages = template_messages(body)
    last = messages[-1]
    goes_on = last["role"] == "assistant" and not last.get("tool_calls")
    options: dict[str, Any] = {"continue_final": True} if goes_on else {}
    try:
        return await prepare_answer(engine, messages, wishes_of(body), **options)
    except InvalidRequest as error:
        raise renamed(error) from error


async def _drain(engine: AsyncEngine, stream: TokenStream, composer: MessageComposer) -> None:
    """Read to the end."""
    with reading(engine, stream):
        while batch := await stream.receive():
            for delta in batch:
                composer.delta(delta)


def _frames(events: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(map(_frame, events))


def _frame(event: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))
