"""Answers the lines of batches, below whatever is interactive."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec
from anyio import to_thread
from anyio.abc import TaskGroup

from engine import AsyncEngine, EngineClosed, EngineFailed, Overloaded, RyzansteinError
from engine.config import BatchSection
from server.batches.database import Database, Row
from server.batches.lines import answer_line, expired_line, read_lines
from server.errors import HTTPError, describe

logger = logging.getLogger("ryzanstein.server")
T = TypeVar("T")

# Between two looks at what there is to do, and at whether interactive requests wait.
LOOK_SECONDS = 0.1
IDLE_SECONDS = 5.0
PURGE_SECONDS = 3600.0
# Lines that wait out an overload.
MOST_RESTING = 64
# A line whose step failed is tried so often.
ATTEMPTS = 3

Answer = Callable[[str, bytes, str, str, int], Awaitable[Any]]
"""Answers a body: (endpoint, body, tenant, request id, seed if it names none)."""


class Worker:
    """Owns the database's thread, and the tasks that answer lines."""

    def __init__(
        self,
        engine: AsyncEngine,
        database: Database,
        section: BatchSection,
        answer: Answer,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._database = database
        self._section = section
        self._answer = answer
        self._now = now
        self._thread = anyio.CapacityLimiter(1)
        self._wake = anyio.Event()
        self._running: dict[tuple[str, int], anyio.CancelScope] = {}
        self._resting: set[tuple[str, int]] = set()
        # By batch: until when it rests after a failure, and the last line that was begun.
        self._rests: dict[str, float] = {}
        self._begun: dict[str, int] = {}

    async def on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run one of the database's methods on its thread."""
        return await to_thread.run_sync(partial(work, *arguments), limiter=self._thread)

    def wake(self) -> None:
        """There is something new to do."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. What was under way is begun again by the next start."""
        purged = -PURGE_SECONDS
        while self._engine.health() == "loading":  # noqa: ASYNC110  (once, at the start)
            await anyio.sleep(LOOK_SECONDS)
        async with anyio.create_task_group() as group:
            while True:
                active: list[Row] = []
                try:
                    if time.monotonic() - purged > PURGE_SECONDS:
                        purged = time.monotonic()
                        await self.on_disk(self._database.purge)
                    active = await self.on_disk(self._database.active)
                except sqlite3.Error as error:
                    # A full disk, above all: the rest of the server goes on.
                    logger.error("batches wait, for their file cannot be used: %s", error)
                    await anyio.sleep(IDLE_SECONDS)
                share = max(1, self._section.max_running // max(1, len(active)))
                for batch in active:
                    await self._try_to_advance(batch, group, share)
                self._wake = anyio.Event()
                with anyio.move_on_after(LOOK_SECONDS if active else IDLE_SECONDS):
                    await self._wake.wait()

    async def _try_to_advance(self, batch: Row, group: TaskGroup, share: int) -> None:
        """Do what can be done; what goes wrong with one batch is no other's affair."""
        identifier = batch["id"]
        if time.monotonic() < self._rests.get(identifier, 0.0):
            return
        try:
            await self._advance(batch, group, share)
        except Exception as error:
            logger.error("batch %s waits: %s", identifier, error, exc_info=error)
            self._rests[identifier] = time.monotonic() + IDLE_SECONDS

    async def _advance(self, batch: Row, group: TaskGroup, share: int) -> None:
        """Do what can be done for a batch now."""
        identifier, status = batch["id"], batch["status"]
        if status == "validating":
            await self._validate(batch)
        elif status == "cancelling":
            if not self._cancel_lines(identifier):
                await self._finish(batch, "cancelled")
        elif self._now() > batch["expires_at"]:
            await self._expire(batch)
        elif batch["completed"] + batch["failed"] == batch["total"]:
            await self._finish(batch, "completed")
        else:
            await self._begin_lines(batch, group, share)

    async def _validate(self, batch: Row) -> None:
        content = await self.on_disk(self._database.content, batch["input_file_id"], batch["owner"])
        if content is None:
            missing = {"code": "missing_file", "message": "the input file was deleted"}
            await self.on_disk(self._database.refuse, batch["id"], [missing])
            return
        try:
            lines, errors = await to_thread.run_sync(read_lines, content, batch["endpoint"])
        except Exception as error:
            # It would be read in the same way again and again.
            logger.error("batch %s cannot be read", batch["id"], exc_info=error)
            lines, errors = [], [{"code": "unreadable", "message": "the file cannot be read"}]
        if errors:
            await self.on_disk(self._database.refuse, batch["id"], errors)
        else:
            await self.on_disk(self._database.begin, batch["id"], lines)
        self.wake()

    async def _begin_lines(self, batch: Row, group: TaskGroup, share: int) -> None:
        """Start as many lines as there is room for, if nobody who waits would wait longer. Batches
        have equal shares, and lines that wait out an overload take no room."""
        mine = sum(owner == batch["id"] for owner, _ in self._running.keys() - self._resting)
        room = min(
            self._section.max_running - len(self._running) + len(self._resting), share - mine
        )
        # However long they rest, there are not many of them.
        resting = sum(owner == batch["id"] for owner, _ in self._resting)
        room = min(room, MOST_RESTING - resting)
        if room <= 0 or len(self._engine.parts.scheduler.queue):
            return
        identifier = batch["id"]
        after = self._begun.get(identifier, -1)
        for line in await self.on_disk(self._database.waiting, identifier, after, room):
            self._begun[identifier] = line["number"]
            scope = anyio.CancelScope()
            self._running[identifier, line["number"]] = scope
            group.start_soon(self._run_line, batch, line, scope)

    async def _run_line(self, batch: Row, line: Row, scope: anyio.CancelScope) -> None:
        number = line["number"]
        try:
            with scope:
                status, body = await self._answered(batch, line)
                name = request_id(batch["id"], number)
                text = answer_line(name, line["custom_id"], status, body)
                await self._keep(batch["id"], number, status, text)
        finally:
            del self._running[batch["id"], number]
            self.wake()

    async def _keep(self, batch: str, number: int, status: int, text: str) -> None:
        """Write an answer, as soon as that can be done."""
        while True:
            try:
                # Not to be cut by a cancellation between an answer and its being kept.
                with anyio.CancelScope(shield=True):
                    await self.on_disk(self._database.answer, batch, number, status, text)
                return
            except sqlite3.Error as error:
                logger.error("an answer waits for its file: %s", error)
                await anyio.sleep(IDLE_SECONDS)

    async def _answered(self, batch: Row, line: Row) -> tuple[int, Any]:
        """A line's status and body. Waits out overload and restarts."""
        digest = hashlib.sha256(f"{batch['id']}/{line['number']}".encode()).digest()
        seed = int.from_bytes(digest[:7], "big")
        name = request_id(batch["id"], line["number"])
        attempts = 0
        while True:
            try:
                body = line["body"].encode()
                answer = await self._answer(batch["endpoint"], body, batch["tenant"], name, seed)
                return 200, answer
            except Overloaded as error:
                place = (batch["id"], line["number"])
                self._resting.add(place)
                try:
                    await anyio.sleep(min(max(error.retry_after, LOOK_SECONDS), 60))
                finally:
                    self._resting.discard(place)
            except EngineFailed as error:
                if isinstance(error, EngineClosed) or self._engine.health() == "failed":
                    await anyio.sleep_forever()  # the next start begins it again
                attempts += 1
                if attempts == ATTEMPTS:
                    return _failure(error)
                await anyio.sleep(LOOK_SECONDS)
            except Exception as error:
                if not isinstance(error, RyzansteinError | HTTPError):
                    logger.error("a batch's line failed", exc_info=error)
                return _failure(error)

    def _cancel_lines(self, identifier: str) -> bool:
        """Cancel a batch's lines; whether there are any that have not ended yet."""
        scopes = [scope for (owner, _), scope in self._running.items() if owner == identifier]
        for scope in scopes:
            scope.cancel()
        return bool(scopes)

    async def _expire(self, batch: Row) -> None:
        if self._cancel_lines(batch["id"]):
            return
        after = -1
        while lines := await self.on_disk(self._database.waiting, batch["id"], after, 1000):
            after = lines[-1]["number"]
            names = [request_id(batch["id"], line["number"]) for line in lines]
            told = [
                (line["number"], expired_line(name, line["custom_id"]))
                for name, line in zip(names, lines, strict=True)
            ]
            await self.on_disk(self._database.expire, batch["id"], told)
        await self._finish(batch, "expired")

    async def _finish(self, batch: Row, status: str) -> None:
        await self.on_disk(self._database.finish, batch["id"], status)
        self._begun.pop(batch["id"], None)
        self._rests.pop(batch["id"], None)
        logger.info("batch %s is %s", batch["id"], status)


def request_id(batch: str, number: int) -> str:
    """The id of a line's request: always the same, so that it can be found again."""
    digest = hashlib.sha256(f"{batch}/{number}".encode()).hexdigest()
    return f"batch_req_{digest[:32]}"


def _failure(error: Exception) -> tuple[int, Any]:
    """What HTTP would have answered."""
    status, body, _ = describe(error)
    return status, msgspec.to_builtins(body)
