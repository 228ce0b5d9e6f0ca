"""The server's files and batches: their database, and the worker that answers lines."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import filelock

from engine import AsyncEngine
from engine.config import BatchSection
from engine.weights.sources import cache_folder
from server.batches.answers import Answers
from server.batches.database import Database
from server.batches.worker import Worker

logger = logging.getLogger("ryzanstein.server")
FILE = "batches.sqlite"


class Batches:
    """Open while the server runs; one server has a folder at a time."""

    def __init__(
        self, database: Database, lock: filelock.FileLock, engine: AsyncEngine, answers: Answers,
        section: BatchSection,
    ) -> None:  # fmt: skip
        self.database = database
        self.section = section
        self._lock = lock
        self._worker = Worker(engine, database, section, answers)
        self.on_disk = self._worker.on_disk
        self.wake = self._worker.wake
        self.run = self._worker.run

    def close(self) -> None:
        """Let another server have the folder."""
        self.database.close()
        self._lock.release()


def open_batches(section: BatchSection, engine: AsyncEngine, answers: Answers) -> Batches | None:
    """The folder's files and batches; None, with one warning, if it cannot be used."""
    folder = Path(section.folder).expanduser() if section.folder else cache_folder() / "batches"
    lock = filelock.FileLock(folder / "server.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        database = Database(folder / FILE)
    except filelock.Timeout:
        logger.warning(
            "another server has %s, so there are no files and batches here; set batches.folder",
            folder,
        )
        return None
    except (OSError, sqlite3.Error) as error:
        lock.release()
        logger.warning("there are no files and batches: %s cannot be used: %s", folder, error)
        return None
    return Batches(database, lock, engine, answers, section)
