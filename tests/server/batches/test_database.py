"""Files and batches on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.batches import database as module
from server.batches.database import Database


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(module, "PART_BYTES", 10)
    found = Database(tmp_path / "x.sqlite")
    yield found
    found.close()


def test_files_are_kept_in_pieces(database: Database) -> None:
    content = bytes(range(256))
    row = database.add_file("me", "x", "batch", content)
    assert database.content(row["id"], "me") == content
    assert database.content(row["id"], "you") is None
    pieces = [database.part(row["id"], number) for number in range(27)]
    assert b"".join(piece or b"" for piece in pieces) == content
    assert pieces[-1] is None
    assert database.delete_file(row["id"], "me")
    assert database.part(row["id"], 0) is None


def test_outputs_are_put_together_in_their_order(database: Database) -> None:
    file = database.add_file("me", "x", "batch", b"in")
    batch = database.add_batch("me", "", "/v1/completions", file["id"], None, 100)
    database.begin(batch["id"], [(f"c{n}", "{}") for n in range(9)])
    for number in (4, 2, 8, 0, 6):
        database.answer(batch["id"], number, 200, f"größe {number}")
        database.answer(batch["id"], number, 500, "a second answer changes nothing")
    database.answer(batch["id"], 1, 500, "failed")
    database.expire(batch["id"], [(3, "late"), (1, "it has one")])
    database.finish(batch["id"], "expired")
    ended = database.batch(batch["id"])
    assert ended is not None
    assert (ended["status"], ended["completed"], ended["failed"]) == ("expired", 5, 2)
    output = database.content(ended["output_file_id"], "me")
    assert output == "".join(f"größe {n}\n" for n in (0, 2, 4, 6, 8)).encode()
    shown = database.file(ended["output_file_id"], "me")
    assert shown is not None
    assert shown["bytes"] == len(output)
    assert database.content(ended["error_file_id"], "me") == b"failed\nlate\n"
    assert database.waiting(batch["id"], -1, 10) == []
