"""`ryzanstein run-batch`: a file of requests answered without a server."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import filelock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine import AsyncEngine, ConfigError, EngineFailed
from engine.config import BatchSection
from engine.embedding.embedder import Embedder
from engine.weights.sources import cache_folder
from server.batches.answers import ENDPOINTS, Answers
from server.batches.database import Database, Row
from server.batches.worker import Worker

LOOK_SECONDS = 0.1
# A batch from the shell has no window that could end.
FOREVER = 100 * 365 * 24 * 3600
OWNER = "shell"


def check_target(source: Path, target: Path) -> None:
    """Refuse to write over anything. Raises ConfigError before a model is loaded."""
    if not source.is_file():
        raise ConfigError(f"there is no file {source}")
    if target.exists() and not _progress_of(target).exists():
        raise ConfigError(f"{target} is there already; remove it, or name another file")


def _progress_of(target: Path) -> Path:
    return target.with_name(target.name + ".progress")


async def run_batch(
    engine: AsyncEngine,
    embedder: Embedder | None,
    source: Path,
    target: Path,
    section: BatchSection,
    console: Console,
) -> Row:
    """Answer `source`'s lines into `target`, in their order; the counts of answers. What was
    answered before an interruption is kept beside `target`, and not answered again.

    Raises ConfigError if the input is wrong, or belongs to another run.
    """
    content = await anyio.Path(source).read_bytes()
    url = _endpoint(content, source)
    kept = _progress_of(target)
    with _alone(target):
        try:
            database = Database(kept)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{kept} cannot be used: {error}") from error
        try:
            batch = _opened(database, content, url, source, kept)
            worker = Worker(engine, database, section, Answers(engine, embedder))
            failures: list[EngineFailed] = []

            async def fail() -> None:
                failures.append(await engine.failure())
                group.cancel_scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(worker.run)
                group.start_soon(fail)
                batch = await _watched(worker, database, batch["id"], console)
                group.cancel_scope.cancel()
            if failures:
                raise failures[0]
            if not batch["errors"]:
                await _written(worker, database, batch, target)
        finally:
            database.close()
        for name in (kept, *(kept.with_name(kept.name + end) for end in ("-wal", "-shm"))):
            name.unlink(missing_ok=True)
    if batch["errors"]:
        raise ConfigError(_told(source, json.loads(batch["errors"])))
    return batch


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Nobody else on this machine writes `target`. Raises ConfigError if somebody does."""
    folder = cache_folder() / "batches"
    name = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:24]
    lock = filelock.FileLock(folder / f"{name}.lock")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConfigError(f"another run-batch is writing {target}") from error
    try:
        yield
    finally:
        lock.release()


def _opened(database: Database, content: bytes, url: str, source: Path, kept: Path) -> Row:
    """The batch of an earlier run of the same input, or a new one."""
    digest = hashlib.sha256(content).hexdigest()
    for batch in database.batches(OWNER):
        if batch["status"] == "failed":
            continue  # it was refused: nothing has been answered
        if json.loads(batch["metadata"])["sha256"] != digest:
            raise ConfigError(f"{kept} is of another input than {source}; remove it to begin anew")
        return batch
    file = database.add_file(OWNER, source.name, "batch", content)
    return database.add_batch(OWNER, "", url, file["id"], {"sha256": digest}, FOREVER)


def _endpoint(content: bytes, source: Path) -> str:
    """What the first line asks for; all lines have to."""
    try:
        url = json.loads(content.lstrip().partition(b"\n")[0])["url"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}: the first line is no request: {error}") from error
    if url not in ENDPOINTS:
        raise ConfigError(f"{source}: url must be one of {', '.join(ENDPOINTS)}")
    return str(url)


async def _watched(worker: Worker, database: Database, identifier: str, console: Console) -> Row:
    """Wait for a batch's end, and show how far it is."""
    columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("answered", total=None)
        while True:
            batch = await worker.on_disk(database.batch, identifier)
            assert batch is not None
            done = batch["completed"] + batch["failed"]
            bar.update(task, completed=done, total=batch["total"] or None)
            if batch["status"] in ("completed", "failed"):
                return batch
            await anyio.sleep(LOOK_SECONDS)


async def _written(worker: Worker, database: Database, batch: Row, target: Path) -> None:
    """Both outputs as one file, in the input's order, complete or not at all."""
    lines: dict[str, bytes] = {}
    for name in ("output_file_id", "error_file_id"):
        content: bytes | None = None
        if batch[name] is not None:
            content = await worker.on_disk(database.content, batch[name], OWNER)
        lines |= {json.loads(line)["custom_id"]: line for line in (content or b"").splitlines()}
    source: bytes | None = await worker.on_disk(database.content, batch["input_file_id"], OWNER)
    assert source is not None
    names = [json.loads(line)["custom_id"] for line in source.splitlines() if line.strip()]
    unfinished = anyio.Path(target.with_name(target.name + ".part"))
    await unfinished.write_bytes(b"".join(lines[name] + b"\n" for name in names))
    await unfinished.replace(target)


def _told(source: Path, errors: list[dict[str, Any]]) -> str:
    first = errors[0]
    where = "" if first.get("line") is None else f", line {first['line']}"
    more = "" if len(errors) == 1 else f" (and {len(errors) - 1} more)"
    return f"{source}{where}: {first['message']}{more}"
