"""Files and batches through OpenAI's client."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.batches.worker import request_id
from tests.server.batches import kills
from tests.server.conftest import MockFactory, batch_process
from tests.server.process import ServerProcess

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with batch_process(tmp_path_factory.mktemp("batches"), delay=0.001, context=400) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def lines(count: int, url: str = CHAT, **body: Any) -> bytes:
    made = []
    for number in range(count):
        request = {"model": "mock", "messages": [{"role": "user", "content": f"n {number}"}]}
        request |= {"max_tokens": 5, **body}
        made.append({"custom_id": f"c{number}", "method": "POST", "url": url, "body": request})
    return "\n".join(map(json.dumps, made)).encode()


def submit(client: openai.OpenAI, content: bytes, **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    options = {"endpoint": CHAT, "completion_window": "24h"} | more
    return client.batches.create(input_file_id=file.id, **options)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    for _ in range(400):
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.02)
    raise AssertionError(batch)


def output(client: openai.OpenAI, identifier: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(identifier).text.splitlines()]


def test_an_owner_whose_files_fill_their_room_deletes_some_first(tmp_path: Path) -> None:
    with (
        batch_process(tmp_path, most=1000) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        first = client.files.create(file=("a", b"x" * 600), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="600 of 1000 bytes") as refused:
            client.files.create(file=("b", b"x" * 401), purpose="batch")
        error = refused.value
        assert (error.status_code, error.code) == (413, "storage_limit_exceeded")
        assert client.files.create(file=("c", b"x" * 400), purpose="batch").bytes == 400
        with pytest.raises(openai.APIStatusError, match="needs 600 more"):
            client.batches.create(input_file_id=first.id, endpoint=CHAT, completion_window="24h")
        client.files.delete(first.id)
        assert client.files.create(file=("d", b"x" * 600), purpose="batch").bytes == 600


def test_a_batch_from_file_to_output(client: openai.OpenAI) -> None:
    made = submit(client, lines(12), metadata={"job": "night"})
    assert (made.status, made.metadata) == ("validating", {"job": "night"})
    batch = ended(client, made)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 12, "completed": 12, "failed": 0}
    assert batch.error_file_id is None
    found = output(client, batch.output_file_id)
    assert [line["custom_id"] for line in found] == [f"c{n}" for n in range(12)]
    for number, line in enumerate(found):
        assert line["error"] is None
        assert line["id"] == line["response"]["request_id"] == request_id(batch.id, number)
        body = line["response"]["body"]
        direct = client.chat.completions.create(
            model="mock", messages=[{"role": "user", "content": f"n {number}"}], max_tokens=5
        )
        assert body["choices"][0]["message"]["content"] == direct.choices[0].message.content
        assert body["usage"]["completion_tokens"] == 5


def test_lines_that_fail_have_a_file_of_their_own(client: openai.OpenAI) -> None:
    good, bad = lines(2), lines(1, max_tokens=0).replace(b"c0", b"bad")
    other = lines(1).replace(b'"mock"', b'"other"').replace(b"c0", b"model")
    batch = ended(client, submit(client, b"\n".join([good, bad, other])))
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    first, second = output(client, batch.error_file_id)
    assert (first["custom_id"], first["response"]["status_code"]) == ("bad", 400)
    assert first["response"]["body"]["error"]["param"] == "max_tokens"
    assert second["response"]["status_code"] == 404
    assert len(output(client, batch.output_file_id)) == 2


def test_a_wrong_file_fails_with_its_lines(client: openai.OpenAI) -> None:
    batch = ended(client, submit(client, lines(1) + b"\n{\n" + lines(1)))
    assert batch.status == "failed"
    assert [(e.code, e.line) for e in batch.errors.data] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
    ]


def test_cancelling_keeps_what_has_been_answered(batch_server: MockFactory) -> None:
    server = batch_server(pages=512, delay=0.01, max_running=2)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        made = submit(client, lines(200))
        while client.batches.retrieve(made.id).request_counts.completed < 3:
            time.sleep(0.02)
        assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
        batch = ended(client, made)
        assert batch.status == "cancelled"
        counts = batch.request_counts
        assert 3 <= counts.completed < 100
        assert len(output(client, batch.output_file_id)) == counts.completed
        assert server.idle()


def test_interactive_requests_go_first(batch_server: MockFactory) -> None:
    """A batch that could fill every slot holds up nobody for longer than a line."""
    server = batch_server(pages=512, delay=0.005, max_running=16, max_batch_tokens=64)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        made = submit(client, lines(300, max_tokens=40))
        while client.batches.retrieve(made.id).request_counts.completed < 3:
            time.sleep(0.02)
        passed = []
        for _ in range(9):
            before = client.batches.retrieve(made.id).request_counts.completed
            client.completions.create(model="mock", prompt="quick", max_tokens=1)
            after = client.batches.retrieve(made.id).request_counts.completed
            passed.append(after - before)
        assert client.batches.retrieve(made.id).status == "in_progress"
        assert sorted(passed)[4] <= 16  # those that had begun
        client.batches.cancel(made.id)
        ended(client, made)


def test_files_are_kept_listed_and_forgotten(client: openai.OpenAI) -> None:
    first = client.files.create(file=("a b.jsonl", b"one"), purpose="batch")
    second = client.files.create(file=("../x?.txt", b"three"), purpose="user_data")
    assert (first.filename, first.bytes, first.status) == ("a b.jsonl", 3, "processed")
    assert "/" not in second.filename
    assert [f.id for f in client.files.list()][:2] == [second.id, first.id]
    assert [f.id for f in client.files.list(purpose="user_data", order="asc")] == [second.id]
    pages = [f.id for f in client.files.list(limit=1)]  # page by page
    assert pages == [f.id for f in client.files.list()]
    assert client.files.content(first.id).read() == b"one"
    assert client.files.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(first.id)


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        ("/files", {"data": {"purpose": "batch"}}, "file"),
        ("/files", {"data": {"purpose": "fun"}, "files": {"file": b"x"}}, "purpose"),
        ("/files", {"json": {}}, "file"),
        ("/batches", {"json": {"endpoint": CHAT, "completion_window": "24h"}}, "input_file_id"),
        (
            "/batches",
            {"json": {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}},
            "input_file_id",
        ),
        (
            "/batches",
            {"json": {"input_file_id": "x", "endpoint": "/v1/x", "completion_window": "24h"}},
            "endpoint",
        ),
        (
            "/batches",
            {"json": {"input_file_id": "x", "endpoint": CHAT, "completion_window": "1h"}},
            "completion_window",
        ),
        (
            "/batches",
            {
                "json": {
                    "input_file_id": "x",
                    "endpoint": "/v1/embeddings",
                    "completion_window": "24h",
                }
            },
            "endpoint",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    server: ServerProcess, path: str, options: dict[str, Any], param: str
) -> None:
    response = httpx.post(f"{server.url}/v1{path}", **options)
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["param"] == param


def test_a_batch_that_cannot_be_read_holds_up_no_other(client: openai.OpenAI) -> None:
    deep = lines(1).replace(b'"max_tokens": 5', b'"x": ' + b"[" * 5000 + b"]" * 5000)
    first, second = submit(client, deep), submit(client, lines(2))
    assert ended(client, first).status == "failed"
    assert ended(client, second).status == "completed"


def test_batches_share_what_there_is(batch_server: MockFactory) -> None:
    server = batch_server(delay=0.01, max_running=4)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        large, small = submit(client, lines(400)), submit(client, lines(3))
        assert ended(client, small).status == "completed"
        assert client.batches.retrieve(large.id).status == "in_progress"
        client.batches.cancel(large.id)
        ended(client, large)


def test_a_second_server_has_no_batches_and_says_why(
    batch_server: MockFactory, mock: ServerProcess
) -> None:
    batch_server()
    other = batch_server()
    assert "another server has" in other.log
    response = httpx.get(f"{other.url}/v1/batches")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "batches_unavailable")
    assert httpx.get(f"{mock.url}/v1/files").status_code == 404  # switched off


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_server_that_is_killed_loses_and_repeats_nothing(tmp_path: Path, seed: int) -> None:
    """`python -m tests.server.batches.kills` does it any number of times."""
    kills.kill_once(tmp_path, random.Random(seed))
