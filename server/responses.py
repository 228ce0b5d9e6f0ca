"""OpenAI's Responses API over HTTP: create, stream, look at again, cancel, forget."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from engine import InvalidRequest
from server.errors import json_response
from server.log import Cursor
from server.openai import check_model, read_body, ready_engine
from server.responses_protocol import (
    HARMLESS,
    ResponsesRequest,
    messages_of,
    prepare_response,
    prompt_of,
    submit,
    tools_of_servers,
)
from server.store import Record, Store
from server.streams import EventStream, Put, completed, race_disconnect
from server.tenants import client_of

PAGE, MOST = 20, 100


async def create(request: Request) -> ASGIApp:
    """`POST /v1/responses`."""
    engine, store = ready_engine(request), store_of(request)
    body, headers = await read_body(request, ResponsesRequest, HARMLESS)
    client = client_of(request)
    if body.generate is False:
        raise InvalidRequest("generate=false is for WebSockets", param="generate")
    previous = previous_of(store, body, client.owner)
    # Servers may have to be asked for their tools.
    record, generation = await race_disconnect(
        request,
        lambda: prepare_response(engine, body, client, previous, servers=store.servers),
    )
    store.start(record, await submit(engine, record, generation))
    if body.stream:
        return _stream(request, record, -1, headers)
    if record.background:
        return json_response(record.composer.snapshot(), headers=headers)
    cursor = store.read(record)
    try:
        await race_disconnect(request, lambda: _drain(cursor))
    finally:
        store.leave(record, cursor)
    # Whoever tries again would have its calls made again.
    called = record.rounds is not None and record.rounds.calls > 0
    if record.error is not None and not called:
        raise record.error
    return json_response(record.composer.snapshot(), headers=headers)


async def one(request: Request) -> ASGIApp:
    """`GET` or `DELETE /v1/responses/{id}`."""
    return await (delete if request.method == "DELETE" else retrieve)(request)


async def retrieve(request: Request) -> ASGIApp:
    """`GET /v1/responses/{id}`, with `stream=true` its events from `starting_after` on."""
    record = _find(request)
    query = request.query_params
    if query.get("stream", "false").lower() not in ("true", "1"):
        return json_response(record.composer.snapshot())
    # A browser that reconnects has the address of its first try, and the header.
    last = request.headers.get("last-event-id")
    after = _integer("starting_after", last or query.get("starting_after", "-1"))
    if last is not None and record.is_over and after == len(record.log.events) - 1:
        return Response(status_code=204)  # tells it to stay away
    return _stream(request, record, after, {})


async def cancel(request: Request) -> ASGIApp:
    """`POST /v1/responses/{id}/cancel`; again, or after its end, changes nothing."""
    record = _find(request)
    store_of(request).cancel(record)
    await record.ended.wait()
    return json_response(record.composer.snapshot())


async def delete(request: Request) -> ASGIApp:
    """`DELETE /v1/responses/{id}`."""
    record = _find(request)
    store_of(request).delete(record)
    return json_response({"id": record.id, "object": "response", "deleted": True})


async def input_items(request: Request) -> ASGIApp:
    """`GET /v1/responses/{id}/input_items`: newest first, unless `order=asc`."""
    record, query = _find(request), request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    limit = _integer("limit", query.get("limit", str(PAGE)))
    if not 1 <= limit <= MOST:
        raise InvalidRequest(f"limit must be between 1 and {MOST}", param="limit")
    items = record.items if order == "asc" else record.items[::-1]
    after = query.get("after")
    if after is not None:
        places = [number for number, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"there is no item {after[:100]!r}", param="after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    body = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
    return json_response(body)


async def count_tokens(request: Request) -> ASGIApp:
    """`POST /v1/responses/input_tokens`: what a request's input would be counted as."""
    engine = ready_engine(request)
    body, headers = await read_body(request, ResponsesRequest, HARMLESS)
    check_model(engine, body.model)
    previous = previous_of(store_of(request), body, client_of(request).owner)
    messages = [*(previous.conversation if previous else []), *messages_of(body.input)]
    remote = await tools_of_servers(store_of(request).servers, body)
    answering = await prompt_of(engine, messages, body, remote)
    answer = {"object": "response.input_tokens", "input_tokens": len(answering.ids)}
    return json_response(answer, headers=headers)


def store_of(request: Request) -> Store:
    """The server's responses."""
    store: Store = request.app.state.store
    return store


def previous_of(store: Store, body: ResponsesRequest, owner: str) -> Record | None:
    """The response that a request goes on from. Raises HTTPError or InvalidRequest."""
    if body.previous_response_id is None:
        return None
    record = store.previous(body.previous_response_id, owner)
    if not record.is_over:
        raise InvalidRequest(
            "the previous response has not ended yet; wait for it, or cancel it",
            param="previous_response_id",
        )
    return record


def _find(request: Request) -> Record:
    ready_engine(request)
    return store_of(request).find(request.path_params["id"], client_of(request).owner)


def _stream(request: Request, record: Record, after: int, headers: dict[str, str]) -> EventStream:
    """A record's events; leaving early counts as its reader's going."""
    store = store_of(request)
    cursor = store.read(record, after)

    async def produce(put: Put) -> None:
        number = cursor.position
        while (event := await cursor.next()) is not None:
            name, body = event
            frame = b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), number, body)
            await completed(put(frame))
            number += 1

    return EventStream(
        produce,
        headers,
        lambda: store.leave(record, cursor),
        settings=request.app.state.settings,
    )


async def _drain(cursor: Cursor) -> None:
    """Read to the end."""
    while await cursor.next() is not None:
        pass


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InvalidRequest(f"{name} must be a whole number", param=name) from None
