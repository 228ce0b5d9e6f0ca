"""What a WebSocket's messages ask for: a response, a chat completion, or a turn of a response."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from engine import InvalidRequest
from server.composers import ChatComposer
from server.format import envelope
from server.lanes import Job
from server.openai import prepare_chat
from server.protocol import ChatRequest, decode
from server.responses_protocol import (
    HARMLESS,
    ResponsesRequest,
    prepare_response,
    steering_messages,
    submit,
)
from server.store import Record, Steer

if TYPE_CHECKING:
    from server.session import Session

Fields = dict[str, msgspec.Raw]


def response_job(session: Session, given: Fields | ResponsesRequest) -> Job:
    """Starts what `response.create` asks for. The fields are checked at once."""
    body = given if isinstance(given, ResponsesRequest) else _response_body(given)
    body = msgspec.structs.replace(body, model=body.model or session.engine.parts.model_name)

    async def start(stream_id: str | None) -> Record:
        previous = None
        if body.previous_response_id is not None:
            previous = session.previous(body.previous_response_id)
            if not previous.is_over:
                raise InvalidRequest(
                    "the previous response has not ended yet; what goes on from it waits for its "
                    "turn on the same stream_id",
                    param="previous_response_id",
                )
        record, generation = await prepare_response(
            session.engine,
            body,
            session.client,
            previous,
            resumable=session.extended,
            servers=session.store.servers,
        )
        record.stream_id, record.progress = stream_id, session.extended
        if body.generate is False:
            session.store.keep(record)
            return record
        session.store.start(record, await submit(session.engine, record, generation))
        return record

    return start


def chat_job(session: Session, fields: Fields) -> Job:
    """Starts what `chat.completion.create` asks for."""
    raw = fields.get("request")
    if raw is None:
        raise InvalidRequest("request is missing: a body of chat completions", param="request")
    body, _ = decode(bytes(raw), ChatRequest)
    engine = session.engine
    body = msgspec.structs.replace(
        body, model=body.model or engine.parts.model_name, stream_options=None, stream=True
    )

    async def start(stream_id: str | None) -> Record:
        generation = await prepare_chat(engine, body, session.client)
        identifier = f"chatcmpl-{uuid.uuid4().hex}"
        parts = engine.parts
        kind = generation.shape.chunk_kind
        wrapper = envelope(identifier, kind, parts.model_name, parts.fingerprint)
        record = Record(
            id=identifier,
            owner=session.client.owner,
            composer=ChatComposer(wrapper, generation.shape),
            resumable=True,
            progress=True,
            stream_id=stream_id,
        )
        session.store.start(record, await generation.submit(engine, identifier))
        return record

    return start


def steer_of(fields: Fields, record: Record | None, identifier: str, most: int) -> Steer:
    """What `response.steer` asks for; its `error` says why it cannot be."""
    given: Any = None
    if (raw := fields.get("input")) is not None:
        given = msgspec.json.decode(raw)
    steer = Steer(f"steer_{uuid.uuid4().hex}", identifier, given)
    if record is None:
        steer.refuse("response_not_found", f"no response {identifier[:100]!r} is active here")
    elif record.settings is None:
        steer.refuse("steering_not_supported", "only responses can be steered")
    elif record.is_over:
        steer.refuse("response_already_completed", "the response has ended")
    elif record.cancelled:
        steer.refuse("response_not_active", "the response was cancelled")
    elif len(record.steers) >= most:
        steer.refuse("too_many_pending_steers", f"{most} steers wait already")
    else:
        try:
            steer.messages = steering_messages(given)
        except InvalidRequest as error:
            steer.refuse("invalid_input", str(error))
    return steer


def _response_body(fields: Fields) -> ResponsesRequest:
    """`response.create` without what belongs to the connection."""
    envelope_fields = ("type", "stream_id", "stream")
    inner = {name: raw for name, raw in fields.items() if name not in envelope_fields}
    body, _ = decode(msgspec.json.encode(inner), ResponsesRequest, HARMLESS)
    if body.background:
        raise InvalidRequest("background is not available on a WebSocket", param="background")
    return body
