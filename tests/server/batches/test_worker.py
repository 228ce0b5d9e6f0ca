"""The worker of batches: what it does when lines cannot be answered."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine import EngineFailed, Overloaded
from engine.config import BatchSection
from server.batches.database import Database, Row
from server.batches.worker import ATTEMPTS, Worker
from tests.mock import mock_engine

URL = "/v1/completions"
Reply = Callable[[str, int], Awaitable[Any]]
"""Answers a custom id's line; given how often it has been asked before."""


class Batch:
    """A worker over the real database and engine, whose lines are answered by the test."""

    def __init__(self, database: Database, worker: Worker) -> None:
        self.database = database
        self._worker = worker

    def add(self, names: list[str], window: int = 100, owner: str = "me") -> str:
        lines = [{"custom_id": n, "method": "POST", "url": URL, "body": {"name": n}} for n in names]
        content = "\n".join(map(json.dumps, lines)).encode()
        file = self.database.add_file(owner, "in", "batch", content)
        made = self.database.add_batch(owner, "", URL, file["id"], None, window)
        self._worker.wake()
        identifier: str = made["id"]
        return identifier

    async def until(self, identifier: str, reached: Callable[[Row], bool]) -> Row:
        with anyio.fail_after(30):
            while True:
                row = await self._worker.on_disk(self.database.batch, identifier)
                assert row is not None
                if reached(row):
                    return row
                await anyio.sleep(0.02)

    async def ended(self, identifier: str) -> Row:
        ends = ("completed", "failed", "expired", "cancelled")
        return await self.until(identifier, lambda row: row["status"] in ends)

    def lines(self, row: Row, name: str = "error_file_id") -> list[dict[str, Any]]:
        content = self.database.content(row[name], row["owner"]) or b""
        return [json.loads(line) for line in content.splitlines()]


@asynccontextmanager
async def working(
    folder: Path, reply: Reply, most: int = 4, now: Callable[[], float] = time.time
) -> AsyncIterator[Batch]:
    asked: dict[str, int] = {}

    async def answer(endpoint: str, body: bytes, tenant: str, name: str, seed: int) -> Any:
        custom = json.loads(body)["name"]
        asked[custom] = asked.get(custom, 0) + 1
        return await reply(custom, asked[custom] - 1)

    engine, _ = mock_engine()
    database = Database(folder / "x.sqlite")
    async with engine, anyio.create_task_group() as group:
        worker = Worker(engine, database, BatchSection(max_running=most), answer, now)
        group.start_soon(worker.run)
        yield Batch(database, worker)
        group.cancel_scope.cancel()
    database.close()


async def test_overload_is_waited_out(tmp_path: Path) -> None:
    async def reply(name: str, before: int) -> Any:
        if before < 2:
            raise Overloaded("later", retry_after=0.01)
        return {"name": name}

    async with working(tmp_path, reply) as batch:
        row = await batch.ended(batch.add(["a", "b"]))
        assert (row["completed"], row["failed"]) == (2, 0)


async def test_whoever_waits_out_an_overload_holds_up_no_other_batch(tmp_path: Path) -> None:
    async def reply(name: str, before: int) -> Any:
        if name.startswith("slow"):
            raise Overloaded("later", retry_after=60)
        return {}

    async with working(tmp_path, reply, most=2) as batch:
        slow = batch.add([f"slow{n}" for n in range(20)])
        await anyio.sleep(0.3)
        assert (await batch.ended(batch.add(["a", "b", "c"])))["completed"] == 3
        batch.database.cancel(slow)
        assert (await batch.ended(slow))["status"] == "cancelled"


async def test_a_step_that_fails_is_tried_again_some_times(tmp_path: Path) -> None:
    async def reply(name: str, before: int) -> Any:
        if name == "never" or before < ATTEMPTS - 1:
            raise EngineFailed("the model's step failed")
        return {}

    async with working(tmp_path, reply) as batch:
        row = await batch.ended(batch.add(["never", "at last"]))
        assert (row["completed"], row["failed"]) == (1, 1)
        (line,) = batch.lines(row)
        assert (line["custom_id"], line["response"]["status_code"]) == ("never", 503)


async def test_a_mistake_of_the_servers_is_told_without_details(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def reply(name: str, before: int) -> Any:
        raise ZeroDivisionError("a secret detail")

    async with working(tmp_path, reply) as batch:
        (line,) = batch.lines(await batch.ended(batch.add(["a"])))
    assert line["response"]["status_code"] == 500
    assert "secret" not in json.dumps(line)
    assert "ZeroDivisionError" in caplog.text


async def test_what_is_not_answered_in_time_is_told(tmp_path: Path) -> None:
    late = 0.0

    async def reply(name: str, before: int) -> Any:
        if name != "quick":
            await anyio.sleep_forever()
        return {}

    async with working(tmp_path, reply, most=2, now=lambda: time.time() + late) as batch:
        made = batch.add(["quick", *(f"slow{n}" for n in range(5))])
        await batch.until(made, lambda row: row["completed"] == 1)
        late = 101.0
        row = await batch.ended(made)
        assert (row["status"], row["completed"], row["failed"]) == ("expired", 1, 5)
        assert {line["error"]["code"] for line in batch.lines(row)} == {"batch_expired"}
        assert len(batch.lines(row, "output_file_id")) == 1


async def test_a_file_that_was_deleted_fails_its_batch(tmp_path: Path) -> None:
    async def reply(name: str, before: int) -> Any:
        return {}

    async with working(tmp_path, reply) as batch:
        made = batch.database.add_batch("me", "", URL, "file-none", None, 100)
        row = await batch.ended(made["id"])
        assert json.loads(row["errors"])[0]["code"] == "missing_file"
