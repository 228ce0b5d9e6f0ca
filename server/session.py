"""One WebSocket of the Responses API, and what the `ryzanstein.v1` subprotocol adds to it.

Responses of one `stream_id` run one after another, those of different ones at once. All of their
events come from logs that outlive the connection; see store.py. docs/websocket.md says it all.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup
from starlette.websockets import WebSocket, WebSocketDisconnect

from engine import AsyncEngine, InvalidRequest
from engine.config import ServerSection
from server.errors import HTTPError, describe
from server.lanes import Job, Lane
from server.log import Cursor
from server.responses_protocol import ResponsesRequest, successor_of
from server.session_jobs import chat_job, response_job, steer_of
from server.store import Record, Store
from server.streams import ClientLeft, logger, receive_text, send_text
from server.tenants import Client, client_of

PROTOCOL = "ryzanstein.v1"
# Requests that may wait in the lanes of one connection, and ended responses that it remembers.
WAITING, REMEMBERED = 64, 32
# Steers that may wait for one response.
STEERS = 8
TRY_AGAIN_LATER, POLICY_VIOLATION = 1013, 1008

Handler = Callable[["Session", dict[str, msgspec.Raw], "str | None"], Awaitable[None]]


class Session:
    """A reader that takes messages, and a task for each lane and each resumed response."""

    def __init__(
        self, socket: WebSocket, engine: AsyncEngine, store: Store, settings: ServerSection
    ) -> None:
        self.engine = engine
        self.store = store
        self.client: Client = client_of(socket)
        self.extended = PROTOCOL in socket.scope.get("subprotocols", ())
        self._settings = settings
        self._socket = socket
        self._lanes: dict[str | None, Lane] = {}
        self._active: dict[str, Record] = {}
        self._remembered: OrderedDict[str, Record] = OrderedDict()
        self._lock = anyio.Lock()
        self._group: TaskGroup

    async def serve(self) -> None:
        """Until the client leaves."""
        await self._socket.accept(subprotocol=PROTOCOL if self.extended else None)
        try:
            await self._welcome()
        except ClientLeft:
            return
        async with anyio.create_task_group() as self._group:
            await self._read()
            self._group.cancel_scope.cancel()

    async def _welcome(self) -> None:
        if self.engine.health() != "ok":
            loading = self.engine.health() == "loading"
            code = "model_loading" if loading else "engine_unavailable"
            await self._fail(HTTPError(503, "the server takes no requests now", code=code))
            await self._socket.close(TRY_AGAIN_LATER)
            raise ClientLeft
        if self.extended:
            await self._send(
                {
                    "type": "session.created",
                    "id": f"sess_{uuid.uuid4().hex}",
                    "max_streams": self._settings.max_streams,
                    "resume_ttl_s": self._settings.resume_ttl_seconds,
                    "max_message_bytes": self._settings.max_body_bytes,
                }
            )

    def previous(self, identifier: str) -> Record:
        """The response that another goes on from: of this connection, or a stored one."""
        record = self._remembered.get(identifier) or self._active.get(identifier)
        if record is None or record.deleted or record.settings is None:
            return self.store.previous(identifier, self.client.owner)
        return record

    async def _read(self) -> None:
        try:
            while True:
                message = await receive_text(self._socket)
                if not self._socket.app.state.directory.knows(self.client):
                    await self._socket.close(POLICY_VIOLATION, "the key is not valid any more")
                    return
                await self._take(message)
        except (WebSocketDisconnect, ClientLeft):
            return

    async def _take(self, message: str | None) -> None:
        """One message, None for a binary one; what is wrong with it is told."""
        stream_id: str | None = None
        try:
            if message is None:
                raise InvalidRequest("send text messages, not binary ones")
            fields = _fields(message)
            stream_id = _stream_id(fields)
            await self._handle(fields, stream_id)
        except (WebSocketDisconnect, ClientLeft):
            raise
        except Exception as error:  # noqa: BLE001  (told to the client, who may go on)
            await self._fail(error, stream_id)

    async def _handle(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        kind = _string(fields, "type") or ""
        handler = HANDLERS.get(kind)
        if handler is None and self.extended:
            handler = EXTENSIONS.get(kind)
        if handler is None:
            if not kind:
                raise InvalidRequest("type is missing", param="type", code="unknown_message")
            hint = f"; it takes the subprotocol {PROTOCOL}" if kind in EXTENSIONS else ""
            raise InvalidRequest(
                f"messages of type {kind[:50]!r} are not known here{hint}",
                param="type",
                code="unknown_message",
            )
        await handler(self, fields, stream_id)

    # Messages

    async def _create(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        self._queue(response_job(self, fields), stream_id)

    async def _create_chat(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        self._queue(chat_job(self, fields), stream_id)

    async def _steer(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        identifier = _string(fields, "previous_response_id") or ""
        record = self._active.get(identifier)
        steer = steer_of(fields, record, identifier, STEERS)
        if steer.error is not None:
            await self._send(steer.failed(), stream_id if record is None else record.stream_id)
            return
        assert record is not None
        record.steers.append(steer)
        record.log.append(steer.accepted())
        self.store.cancel(record, "steered")

    async def _cancel(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        record = self._named(fields)
        record.cancelled = record.cancelled or not record.is_over
        self.store.cancel(record)

    async def _pause(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        self.store.pause(self._named(fields))

    async def _continue(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        self.store.proceed(self._named(fields))

    async def _resume(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        record = self._named(fields)
        after = _integer(fields, "starting_after", -1)
        lane = stream_id if "stream_id" in fields else record.stream_id
        readers = sum(one.readers for one in self._lanes.values())
        if readers >= self._settings.max_streams:
            raise self._crowded(f"{readers} responses are already being read on here")
        into = self._lane(lane)
        cursor = self.store.read(record, after)
        into.readers += 1
        self._group.start_soon(self._read_on, record, cursor, into, lane)

    async def _credit(self, fields: dict[str, msgspec.Raw], stream_id: str | None) -> None:
        events = _integer(fields, "events", 0)
        if not 0 < events < 2**31:
            raise InvalidRequest("events must be a whole number above 0", param="events")
        self._lane(stream_id).grant(events)

    def _named(self, fields: dict[str, msgspec.Raw]) -> Record:
        identifier = _string(fields, "response_id") or ""
        return self._remembered.get(identifier) or self.store.find(identifier, self.client.owner)

    # Lanes

    def _lane(self, stream_id: str | None) -> Lane:
        lane = self._lanes.get(stream_id)
        if lane is None:
            if len(self._lanes) >= self._settings.max_streams:
                idle = [key for key, one in self._lanes.items() if one.is_idle]
                if not idle:
                    raise self._crowded(f"{len(self._lanes)} streams are busy on this connection")
                del self._lanes[idle[0]]
            lane = self._lanes[stream_id] = Lane()
        return lane

    def _queue(self, job: Job, stream_id: str | None) -> None:
        lane = self._lane(stream_id)
        if sum(len(one.jobs) for one in self._lanes.values()) >= WAITING:
            raise self._crowded(f"{WAITING} requests are already waiting on this connection")
        lane.jobs.append(job)
        if not lane.busy:
            lane.busy = True
            self._group.start_soon(self._work, lane, stream_id)

    def _crowded(self, message: str) -> HTTPError:
        code, headers = "rate_limit_exceeded", {"retry-after": "1"}
        return HTTPError(429, message, param="stream_id", code=code, headers=headers)

    async def _work(self, lane: Lane, stream_id: str | None) -> None:
        """Run a lane's requests in turn, until none is left."""
        try:
            while lane.jobs:
                await self._answer(lane, lane.jobs.popleft(), stream_id)
        except ClientLeft:
            return
        finally:
            lane.busy = False

    async def _answer(self, lane: Lane, job: Job, stream_id: str | None) -> None:
        """One request of a lane, from its start to its end."""
        try:
            record = await job(stream_id)
        except Exception as error:  # noqa: BLE001  (told to the client, who may go on)
            await self._fail(error, stream_id)
            return
        self._active[record.id] = record
        await self._forward(record, self.store.read(record), lane, stream_id)
        self._remember(record)
        lane.used = True
        if record.steers and not record.cancelled:
            lane.jobs.appendleft(self._successor(record))
        for steer in record.steers:
            steer.refuse("response_not_active", "the response was cancelled")
            await self._send(steer.failed(), stream_id)

    def _successor(self, record: Record) -> Job:
        """What goes on from a response that was steered."""
        steers, record.steers = record.steers, []

        async def start(stream_id: str | None) -> Record:
            messages = [message for steer in steers for message in steer.messages]
            body: ResponsesRequest = successor_of(record.settings, record.id, messages)
            try:
                return await response_job(self, body)(stream_id)
            except Exception as error:
                for steer in steers:
                    steer.refuse("successor_creation_failed", str(describe(error)[1].error.message))
                    await self._send(steer.failed(), stream_id)
                raise

        return start

    def _remember(self, record: Record) -> None:
        self._active.pop(record.id, None)
        self._remembered[record.id] = record
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

    # Sending

    async def _read_on(
        self, record: Record, cursor: Cursor, lane: Lane, stream_id: str | None
    ) -> None:
        """Forward a response that another connection, or this one, began."""
        try:
            await self._forward(record, cursor, lane, stream_id)
        except ClientLeft:
            return
        finally:
            lane.readers -= 1

    async def _forward(
        self, record: Record, cursor: Cursor, lane: Lane, stream_id: str | None
    ) -> None:
        """A record's events, as credit allows. However it is left, its reader has gone."""
        try:
            while await cursor.ready():
                await lane.take_credit()
                await self._send_encoded(cursor.take()[1], stream_id)
        finally:
            self.store.leave(record, cursor)

    async def _fail(self, error: Exception, stream_id: str | None = None) -> None:
        status, body, headers = describe(error)
        if status == 500:
            logger.error("WebSocket message failed", exc_info=error)
        detail: dict[str, Any] = msgspec.structs.asdict(body.error)
        if headers:
            detail["headers"] = headers
        await self._send({"type": "error", "status": status, "error": detail}, stream_id)

    async def _send(self, event: dict[str, Any], stream_id: str | None = None) -> None:
        await self._send_encoded(msgspec.json.encode(event), stream_id)

    async def _send_encoded(self, body: bytes, stream_id: str | None) -> None:
        """One event; lanes and the reader take turns."""
        if stream_id is not None or self.extended:
            body = b'{"stream_id":' + msgspec.json.encode(stream_id) + b"," + body[1:]
        async with self._lock:
            await send_text(self._socket, body.decode())


HANDLERS: dict[str, Handler] = {
    "response.create": Session._create,
    "response.steer": Session._steer,
}
EXTENSIONS: dict[str, Handler] = {
    "chat.completion.create": Session._create_chat,
    "response.cancel": Session._cancel,
    "response.pause": Session._pause,
    "response.continue": Session._continue,
    "response.resume": Session._resume,
    "flow.credit": Session._credit,
}


def _fields(message: str) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(
            message.encode("utf-8", errors="surrogatepass"), type=dict[str, msgspec.Raw]
        )
    except msgspec.ValidationError as error:
        raise InvalidRequest("a message has to be a JSON object", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("the message is not valid JSON", code="invalid_json") from error


def _stream_id(fields: dict[str, msgspec.Raw]) -> str | None:
    found = _string(fields, "stream_id")
    if found is not None and not 0 < len(found) <= 128:
        raise InvalidRequest("stream_id must have 1 to 128 characters", param="stream_id")
    return found


def _string(fields: dict[str, msgspec.Raw], name: str) -> str | None:
    found: str | None = _decoded(fields, name, str | None, "text")
    return found


def _integer(fields: dict[str, msgspec.Raw], name: str, default: int) -> int:
    found: int | None = _decoded(fields, name, int | None, "a whole number")
    return default if found is None else found


def _decoded(fields: dict[str, msgspec.Raw], name: str, kind: Any, what: str) -> Any:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{name} must be {what}", param=name, code="invalid_type") from error


async def responses_socket(socket: WebSocket) -> None:
    """`GET /v1/responses` with an upgrade."""
    state = socket.app.state
    await Session(socket, state.engine, state.store, state.settings).serve()
