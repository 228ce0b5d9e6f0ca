"""Responses that outlive a connection: who owns them, who reads them, and when they end.

Each has a task that turns its deltas into events of a log, as fast as somebody reads, or freely
while nobody does. A reader that takes nothing holds up this one response alone: its deltas join,
then the scheduler sets it aside, and in the end it fails.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from engine import AsyncEngine, TokenStream
from engine.config import ServerSection
from server.bridge.servers import Servers
from server.composers import ENDED, Composer
from server.errors import HTTPError, describe
from server.log import Cursor, Event, EventLog
from server.response_composer import conversation

logger = logging.getLogger("ryzanstein.server")

# Tokens that may join in one delta before their request is set aside.
HIGH_WATER = 64
# Bytes of events that ended responses may take together.
KEPT_BYTES = 64 << 20
# How often those who wait in the queue are told where they stand.
PROGRESS_SECONDS = 0.25


@dataclass(eq=False)
class Steer:
    """Input for a response that is under way: it ends, and a successor goes on with the input."""

    id: str
    previous_response_id: str
    input: Any
    messages: list[dict[str, str]] = field(default_factory=list)
    error: dict[str, str] | None = None

    def refuse(self, code: str, message: str) -> None:
        """It cannot be."""
        self.error = {"type": "invalid_request_error", "code": code, "message": message}

    def accepted(self) -> Event:
        """Told when it waits for its turn."""
        steer = {"id": self.id, "previous_response_id": self.previous_response_id}
        return {"type": "response.steer.accepted", "steer": steer}

    def failed(self) -> Event:
        """Told with the input when it cannot be."""
        steer = {
            "id": self.id,
            "previous_response_id": self.previous_response_id,
            "input": self.input,
        }
        return {
            "type": "response.steer.failed",
            "sequence_number": 0,
            "error": self.error,
            "steer": steer,
        }


@dataclass(eq=False)
class Record:
    """One response. `resumable` ones go on for a while without a reader, `background` ones for
    good; `kept` ones can be asked for after they have ended."""

    id: str
    owner: str
    composer: Composer
    rounds: Rounds | None = None
    """What makes calls and goes on when a turn has ended."""
    calling: anyio.CancelScope | None = None
    stopping: bool = False
    resumable: bool = False
    background: bool = False
    kept: bool = False
    progress: bool = False
    """Whether its place in the queue is told."""
    stream_id: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation up to its own answer, without instructions."""
    items: list[dict[str, Any]] = field(default_factory=list)
    settings: Any = None
    """What a successor takes over."""
    log: EventLog = field(default_factory=EventLog)
    stream: TokenStream | None = None
    cut: str = ""
    error: Exception | None = None
    paused: bool = False
    """Whether its client has set it aside."""
    held: bool = False
    """Whether the scheduler has, since nobody reads."""
    cancelled: bool = False
    deleted: bool = False
    drops: int = 0
    steers: list[Steer] = field(default_factory=list)
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def is_over(self) -> bool:
        """Whether all of its events are there."""
        return self.log.closed

    @property
    def bytes(self) -> int:
        """About what it takes in memory."""
        said = sum(len(message["content"]) for message in self.messages)
        return self.log.bytes + 2 * said

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All that was said, its own answer included."""
        return conversation(self.messages, self.composer.spoken)


class Rounds(Protocol):
    """A response's further turns."""

    async def next(
        self, request_id: str, tell: Callable[[list[Event]], None]
    ) -> TokenStream | None:
        """Do what comes between two turns; the next one's stream, or None if there is none."""
        ...

    def cut(self) -> None:
        """It was cancelled between two turns."""
        ...

    @property
    def calls(self) -> int:
        """Calls that have been made."""
        ...


class Store:
    """All responses of one server that are under way or kept."""

    def __init__(
        self, engine: AsyncEngine, settings: ServerSection, servers: Servers | None = None
    ) -> None:
        self.servers = servers
        self._engine = engine
        self._settings = settings
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._detached: set[Record] = set()
        self._group: TaskGroup

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """While this is entered responses can run."""
        async with anyio.create_task_group() as self._group:
            yield
            self._group.cancel_scope.cancel()

    def start(self, record: Record, stream: TokenStream | None) -> None:
        """Let a response run that has been submitted; without a stream its `rounds` begin it. A
        drain waits for all of its turns, unless it is set aside."""
        record.stream = stream
        if record.rounds is not None:
            self._engine.door.hold(record.id, lambda: not (record.paused or record.held))
        self._records[record.id] = record
        self._append(record, record.composer.begin(queued=record.background))
        self._group.start_soon(self._run, record, stream)

    def keep(self, record: Record) -> None:
        """Take in a response that has nothing to generate."""
        self._records[record.id] = record
        record.log.unbind()
        self._append(record, record.composer.nothing())
        record.log.close()
        record.ended.set()
        self._forget_oldest()

    def find(self, identifier: str, owner: str) -> Record:
        """A response of this owner's. Raises HTTPError 404."""
        record = self._owned(identifier, owner)
        if record is None:
            raise HTTPError(
                404,
                f"there is no response {identifier[:100]!r} (any more)",
                param="response_id",
                code="response_not_found",
            )
        return record

    def previous(self, identifier: str, owner: str) -> Record:
        """The response that another goes on from. Raises HTTPError 404."""
        record = self._owned(identifier, owner)
        # A chat completion is none: its conversation is not kept.
        if record is None or record.settings is None:
            raise HTTPError(
                404,
                f"there is no response {identifier[:100]!r} to go on from (any more)",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return record

    def cancel(self, record: Record, reason: str = "") -> None:
        """End a response as it stands; one that has ended stays as it is."""
        if not record.is_over:
            record.cut = record.cut or reason
            record.log.unbind()
            if record.stream is not None:
                self._engine.abort(*record.stream.request_ids)
            record.stopping = True
            if record.calling is not None:
                record.calling.cancel()

    def delete(self, record: Record) -> None:
        """Forget a response, after ending it."""
        self.cancel(record)
        record.deleted = True
        self._records.pop(record.id, None)

    def pause(self, record: Record) -> None:
        """Set a response aside until `proceed`. Raises HTTPError 429 if its owner has too many."""
        if record.is_over or record.paused:
            return
        count = sum(r.paused and r.owner == record.owner for r in self._records.values())
        if count >= self._settings.max_streams:
            raise HTTPError(
                429,
                f"{count} responses are set aside already; let some go on, or cancel them",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        record.paused = True
        if record.stream is not None:
            self._engine.pause(*record.stream.request_ids)

    def proceed(self, record: Record) -> None:
        """Let a response go on that was set aside."""
        if record.paused:
            record.paused = False
            if not record.held and record.stream is not None:
                self._engine.unpause(*record.stream.request_ids)

    def leave(self, record: Record, cursor: Cursor) -> None:
        """A reader goes. The last one's going ends what nobody may come back to."""
        cursor.close()
        if record.log.readers or (record.background and not record.paused):
            return
        if record.is_over and not record.resumable:
            self._settle(record)
        elif record.resumable and (record.is_over or self._may_detach(record.owner)):
            # What was sent last may never have arrived.
            self._detached.add(record)
            record.drops += 1
            self._group.start_soon(self._expire, record, record.drops)
        else:
            self.cancel(record)

    def read(self, record: Record, starting_after: int = -1) -> Cursor:
        """A new reader."""
        if not -1 <= starting_after < max(1, len(record.log.events)):
            raise HTTPError(
                400,
                f"starting_after is {starting_after}; the response has "
                f"{len(record.log.events)} events, numbered from 0",
                param="starting_after",
                code="invalid_value",
            )
        self._detached.discard(record)
        return Cursor(record.log, starting_after)

    def _owned(self, identifier: str, owner: str) -> Record | None:
        record = self._records.get(identifier)
        return record if record is not None and record.owner == owner else None

    def _may_detach(self, owner: str) -> bool:
        count = sum(r.owner == owner and not r.is_over for r in self._detached)
        return count < self._settings.detached_streams

    async def _expire(self, record: Record, drop: int) -> None:
        """End a response that nobody came back to, or forget it once it has ended by itself."""
        await anyio.sleep(self._settings.resume_ttl_seconds)
        if record.log.readers or record not in self._detached or record.drops != drop:
            return
        self._detached.discard(record)
        self.cancel(record)
        if record.is_over:
            self._settle(record)

    async def _run(self, record: Record, stream: TokenStream | None) -> None:
        """Everything that happens to one response."""
        composer = record.composer
        try:
            if stream is not None:
                await self._tell_progress(record, stream)
            else:
                stream = await self._begin_turn(record)
            while stream is not None:
                await self._read_turn(record, stream)
                stream = await self._begin_turn(record)
            self._append(record, composer.end(record.cut))
        except Exception as error:
            status, body, _ = describe(error)
            if status == 500:
                logger.error("response %s failed", record.id, exc_info=error)
            record.error = error
            self._append(record, composer.fail(body.error))
        finally:
            if record.stream is not None:
                self._engine.abort(*record.stream.request_ids)
            self._end(record)

    async def _read_turn(self, record: Record, stream: TokenStream) -> None:
        """Tell what a turn says, to its end."""
        while True:
            if not record.log.has_room:
                await self._wait_for_reader(record, stream)
            deltas = await stream.receive()
            if not deltas:
                return
            for delta in deltas:
                self._append(record, record.composer.delta(delta))

    async def _begin_turn(self, record: Record) -> TokenStream | None:
        """The next turn's stream, if there is one; set aside if its client wants that."""
        stream = await self._next_turn(record)
        if stream is not None:
            record.stream = stream
            if record.paused:
                self._engine.pause(*stream.request_ids)
        return stream

    async def _next_turn(self, record: Record) -> TokenStream | None:
        """The stream of a response's next turn, once its calls have been made; None if there is
        none. Cancelling the response ends what is being called."""
        if record.rounds is None:
            return None
        following: TokenStream | None = None
        with anyio.CancelScope() as record.calling:
            if record.stopping:
                record.calling.cancel()  # it was cancelled when its turn was over already
            following = await record.rounds.next(record.id, partial(self._append, record))
        cut = record.calling.cancelled_caught or (record.stopping and following is not None)
        record.calling = None
        if cut:
            record.rounds.cut()
            if following is not None:
                self._engine.abort(*following.request_ids)
            return None
        return following

    async def _wait_for_reader(self, record: Record, stream: TokenStream) -> None:
        """Until a reader has caught up by half; HTTPError if none gets on at all for too long."""
        ids, seconds = stream.request_ids, self._settings.slow_consumer_seconds

        def hold() -> None:
            record.held = True
            self._engine.pause(*ids)

        stream.when_full(HIGH_WATER, hold)
        while record.log.is_full and not stream.is_over:
            with anyio.move_on_after(seconds) as patience:
                await record.log.movement()
            if patience.cancelled_caught and not stream.is_over:
                raise HTTPError(
                    408,
                    f"nothing was read for {seconds:g} seconds; read faster, or cancel",
                    code="slow_consumer",
                    headers={"x-should-retry": "false"},
                )
        stream.when_full(0, None)
        record.held = False
        if not record.paused:
            self._engine.unpause(*ids)

    async def _tell_progress(self, record: Record, stream: TokenStream) -> None:
        """Where the response stands in the queue, whenever that has changed, until it begins."""
        if not record.progress:
            return
        told: int | None = None
        with anyio.move_on_after(PROGRESS_SECONDS):
            await stream.ready()  # most begin at once
            return
        while (found := self._engine.queue_progress(record.id)) is not None:
            if found.position != told:
                told = found.position
                event = {
                    "type": "response.queued.progress",
                    "response_id": record.id,
                    "position": found.position,
                    "eta_ms": round(found.seconds * 1e3),
                    "reason": found.reason,
                }
                self._append(record, [event])
            with anyio.move_on_after(PROGRESS_SECONDS):
                await stream.ready()
                return

    def _append(self, record: Record, events: list[dict[str, Any]]) -> None:
        for event in events:
            record.log.append(event)

    def _end(self, record: Record) -> None:
        assert record.composer.status in ENDED or record.error is None
        self._engine.door.release(record.id)
        record.log.close()
        record.ended.set()
        if record.id in self._records:
            self._records.move_to_end(record.id)  # kept in the order of their ends
        if not record.log.readers and record not in self._detached:
            self._settle(record)
        self._forget_oldest()

    def _settle(self, record: Record) -> None:
        """Nobody reads a response that has ended: keep it if that was asked for."""
        if not record.kept and not record.background:
            self._records.pop(record.id, None)

    def _forget_oldest(self) -> None:
        ended = [r for r in self._records.values() if r.is_over and not r.log.readers]
        size, count = sum(r.bytes for r in ended), len(ended)
        if count <= self._settings.stored_responses and size <= KEPT_BYTES:
            return
        answers, held = Counter(r.owner for r in ended), Counter[str]()
        for record in ended:
            held[record.owner] += record.bytes
        while ended and (count > self._settings.stored_responses or size > KEPT_BYTES):
            # The oldest of whoever has the most, so that nobody's go for another's sake.
            shares = held if size > KEPT_BYTES else answers
            most = max(shares.values())
            record = next(r for r in ended if shares[r.owner] == most)
            ended.remove(record)
            del self._records[record.id]
            answers[record.owner] -= 1
            held[record.owner] -= record.bytes
            size, count = size - record.bytes, count - 1
