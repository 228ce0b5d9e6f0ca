"""What files and batches are kept in: one SQLite file, which survives whatever ends the server.

Every change is one transaction. A line's answer and the count of answers are in the same one, so
that a line is never lost, and never answered twice. All calls are for one thread.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = 2
SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
) STRICT;
CREATE TABLE parts (
    file TEXT NOT NULL REFERENCES files (id) ON DELETE CASCADE, number INTEGER NOT NULL,
    content BLOB NOT NULL, PRIMARY KEY (file, number)
) STRICT;
CREATE TABLE batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, tenant TEXT NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL,
    in_progress_at INTEGER, finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER,
    expired_at INTEGER, cancelling_at INTEGER, cancelled_at INTEGER, expires_at INTEGER NOT NULL,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, metadata TEXT, output_file_id TEXT, error_file_id TEXT,
    errors TEXT
) STRICT;
CREATE TABLE lines (
    batch TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, body TEXT NOT NULL,
    status INTEGER, answer TEXT, PRIMARY KEY (batch, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX waiting ON lines (batch, number) WHERE status IS NULL;
CREATE INDEX files_of ON files (owner, created_at);
CREATE INDEX batches_of ON batches (owner, created_at);
"""
# Files are kept, and read, in pieces of about this size.
PART_BYTES = 4 << 20
# Bytes of an owner's files, and once more of those that its batches are at work on.
STORED = """
SELECT (SELECT coalesce(sum(bytes), 0) FROM files WHERE owner = ?) +
  (SELECT coalesce(sum(bytes), 0) FROM batches JOIN files ON files.id = input_file_id
   WHERE batches.owner = ? AND status IN ('validating', 'in_progress', 'cancelling')) AS bytes
"""
# All that a list shows of a file.
SHOWN = "id, owner, filename, purpose, bytes, created_at, expires_at"
ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")
Row = dict[str, Any]


class StorageFull(Exception):
    """An owner has `held` bytes and wants `more`, but may have `most`."""

    def __init__(self, held: int, more: int, most: int) -> None:
        super().__init__(f"{held} + {more} > {most}")
        self.held, self.more, self.most = held, more, most


class Database:
    """Opens the file, making it if it is not there. Raises sqlite3.Error if it cannot be used."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        # Each commit is on the disk before it is told.
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"it has version {version}; this server knows {VERSION}")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # Files

    def adopt(self, owners: Mapping[str, str]) -> None:
        """Give what belongs to these owners to others."""
        pairs = [(new, old) for old, new in owners.items()]
        with self._transaction():
            for table in ("files", "batches"):
                self._connection.executemany(f"UPDATE {table} SET owner = ? WHERE owner = ?", pairs)

    def stored_bytes(self, owner: str) -> int:
        """Of an owner's files, and of those that its batches are at work on once more."""
        row = self._one(STORED, owner, owner)
        assert row is not None
        size: int = row["bytes"]
        return size

    def add_file(
        self,
        owner: str,
        filename: str,
        purpose: str,
        content: bytes,
        seconds: int | None = None,
        most: int | None = None,
    ) -> Row:
        """Keep a file, for some seconds or until it is deleted; what it is shown as. Raises
        StorageFull if its owner would have more than `most` bytes."""
        self._check_room(owner, len(content), most)
        now = int(time.time())
        values = (
            f"file-{uuid.uuid4().hex}",
            owner,
            filename,
            purpose,
            len(content),
            now,
            None if seconds is None else now + seconds,
        )
        pieces = (content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES))
        with self._transaction():
            self._insert_file(values)
            self._insert_parts(values[0], pieces)
        return self._one(f"SELECT {SHOWN} FROM files WHERE id = ?", values[0]) or {}

    def file(self, identifier: str, owner: str) -> Row | None:
        """An owner's file, without its content."""
        return self._one(f"SELECT {SHOWN} FROM files WHERE id = ? AND owner = ?", identifier, owner)

    def content(self, identifier: str, owner: str) -> bytes | None:
        """An owner's file's content; None if there is no such file."""
        if self.file(identifier, owner) is None:
            return None
        rows = self._all("SELECT content FROM parts WHERE file = ? ORDER BY number", identifier)
        return b"".join(row["content"] for row in rows)

    def part(self, identifier: str, number: int) -> bytes | None:
        """A piece of a file's content; None behind the last."""
        query = "SELECT content FROM parts WHERE file = ? AND number = ?"
        row = self._one(query, identifier, number)
        return None if row is None else row["content"]

    def files(self, owner: str, purpose: str | None) -> list[Row]:
        """An owner's files, oldest first."""
        every = f"SELECT {SHOWN} FROM files WHERE owner = ? ORDER BY created_at, rowid"
        return [r for r in self._all(every, owner) if purpose in (None, r["purpose"])]

    def delete_file(self, identifier: str, owner: str) -> bool:
        """Whether there was such a file."""
        done = self._connection.execute(
            "DELETE FROM files WHERE id = ? AND owner = ?", (identifier, owner)
        )
        return done.rowcount > 0

    # Batches

    def add_batch(
        self,
        owner: str,
        tenant: str,
        endpoint: str,
        file: str,
        metadata: Any,
        window: int,
        most: int | None = None,
    ) -> Row:
        """A new batch, whose lines have not been read yet. Raises StorageFull if its owner would
        have more than `most` bytes, this file's being there twice."""
        row = self.file(file, owner)
        self._check_room(owner, 0 if row is None else row["bytes"], most)
        now = int(time.time())
        identifier = f"batch_{uuid.uuid4().hex}"
        self._connection.execute(
            "INSERT INTO batches (id, owner, tenant, endpoint, input_file_id, status, created_at,"
            " expires_at, metadata) VALUES (?, ?, ?, ?, ?, 'validating', ?, ?, ?)",
            (identifier, owner, tenant, endpoint, file, now, now + window, json.dumps(metadata)),
        )
        return self.batch(identifier) or {}

    def batch(self, identifier: str) -> Row | None:
        """A batch, whoever owns it."""
        return self._one("SELECT * FROM batches WHERE id = ?", identifier)

    def batches(self, owner: str) -> list[Row]:
        """An owner's batches, newest first."""
        every = "SELECT * FROM batches WHERE owner = ? ORDER BY created_at DESC, rowid DESC"
        return self._all(every, owner)

    def active(self) -> list[Row]:
        """All that have something to be done, oldest first."""
        marks = ", ".join("?" * len(ACTIVE))
        every = f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY created_at, rowid"
        return self._all(every, *ACTIVE)

    def begin(self, identifier: str, lines: Sequence[tuple[str, str]]) -> None:
        """A batch's lines, (custom id, body), have been read, and can be answered."""
        with self._transaction():
            rows = [(identifier, n, name, body) for n, (name, body) in enumerate(lines)]
            self._connection.executemany(
                "INSERT INTO lines (batch, number, custom_id, body) VALUES (?, ?, ?, ?)", rows
            )
            self._connection.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ?, total = ?"
                " WHERE id = ? AND status = 'validating'",
                (int(time.time()), len(lines), identifier),
            )

    def refuse(self, identifier: str, errors: list[Row]) -> None:
        """A batch's file is wrong."""
        self._connection.execute(
            "UPDATE batches SET status = 'failed', failed_at = ?, errors = ? WHERE id = ?",
            (int(time.time()), json.dumps(errors), identifier),
        )

    def waiting(self, identifier: str, after: int, most: int) -> list[Row]:
        """A batch's next lines without an answer, after a number."""
        return self._all(
            "SELECT number, custom_id, body FROM lines"
            " WHERE batch = ? AND status IS NULL AND number > ? ORDER BY number LIMIT ?",
            identifier, after, most,
        )  # fmt: skip

    def answer(self, identifier: str, number: int, status: int, answer: str) -> None:
        """A line's answer, once; `status` is HTTP's."""
        counted = "completed" if status == 200 else "failed"
        with self._transaction():
            done = self._connection.execute(
                "UPDATE lines SET status = ?, answer = ?"
                " WHERE batch = ? AND number = ? AND status IS NULL",
                (status, answer, identifier, number),
            )
            if done.rowcount:
                self._connection.execute(
                    f"UPDATE batches SET {counted} = {counted} + 1 WHERE id = ?", (identifier,)
                )

    def expire(self, identifier: str, lines: Sequence[tuple[int, str]]) -> None:
        """Lines, (number, answer), that were not answered in time."""
        with self._transaction():
            done = self._connection.executemany(
                "UPDATE lines SET status = 408, answer = ?"
                " WHERE batch = ? AND number = ? AND status IS NULL",
                [(answer, identifier, number) for number, answer in lines],
            )
            self._connection.execute(
                "UPDATE batches SET failed = failed + ? WHERE id = ?", (done.rowcount, identifier)
            )

    def cancel(self, identifier: str) -> None:
        """A batch that is under way is to end."""
        self._connection.execute(
            "UPDATE batches SET status = 'cancelling', cancelling_at = ?"
            " WHERE id = ? AND status IN ('validating', 'in_progress')",
            (int(time.time()), identifier),
        )

    def finish(self, identifier: str, status: str) -> None:
        """No more lines are answered: put the answers into files, and end the batch."""
        batch = self.batch(identifier)
        assert batch is not None
        now = int(time.time())
        with self._transaction():
            for name, condition in (
                ("output_file_id", "status = 200"),
                ("error_file_id", "status <> 200"),
            ):
                size = self._connection.execute(
                    f"SELECT sum(length(CAST(answer AS BLOB)) + 1) FROM lines"
                    f" WHERE batch = ? AND {condition}",
                    (identifier,),
                ).fetchone()[0]
                if size:
                    file = f"file-{uuid.uuid4().hex}"
                    title = f"{identifier}_{name.partition('_')[0]}.jsonl"
                    self._insert_file(
                        (file, batch["owner"], title, "batch_output", size, now, None)
                    )
                    self._insert_parts(file, self._answers(identifier, condition))
                    self._connection.execute(
                        f"UPDATE batches SET {name} = ? WHERE id = ?", (file, identifier)
                    )
            self._connection.execute("DELETE FROM lines WHERE batch = ?", (identifier,))
            self._connection.execute(
                f"UPDATE batches SET status = ?, finalizing_at = ?, {status}_at = ? WHERE id = ?",
                (status, now, now, identifier),
            )

    def _check_room(self, owner: str, more: int, most: int | None) -> None:
        held = self.stored_bytes(owner)
        if most is not None and held + more > most:
            raise StorageFull(held, more, most)

    def purge(self) -> None:
        """Forget files that have expired."""
        self._connection.execute("DELETE FROM files WHERE expires_at < ?", (int(time.time()),))

    def _answers(self, identifier: str, condition: str) -> Iterator[bytes]:
        """A batch's answers as pieces of a file."""
        rows = self._connection.execute(
            f"SELECT answer FROM lines WHERE batch = ? AND {condition} ORDER BY number",
            (identifier,),
        )
        held = bytearray()
        for row in rows:
            held += row["answer"].encode() + b"\n"
            if len(held) >= PART_BYTES:
                yield bytes(held)
                held.clear()
        if held:
            yield bytes(held)

    def _insert_file(self, values: tuple[Any, ...]) -> None:
        marks = ", ".join("?" * len(values))
        self._connection.execute(f"INSERT INTO files ({SHOWN}) VALUES ({marks})", values)

    def _insert_parts(self, file: str, pieces: Iterable[bytes]) -> None:
        for number, content in enumerate(pieces):
            self._connection.execute(
                "INSERT INTO parts (file, number, content) VALUES (?, ?, ?)",
                (file, number, content),
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> Row | None:
        row = self._connection.execute(query, values).fetchone()
        return None if row is None else dict(row)

    def _all(self, query: str, *values: Any) -> list[Row]:
        return [dict(row) for row in self._connection.execute(query, values)]
