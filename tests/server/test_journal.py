"""The log: what it says, and that it never holds anything up."""

from __future__ import annotations

import ast
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from server import journal as module
from server.journal import MOST_ALIKE, Journal, Lines, bind
from tests.server.conftest import MockFactory
from tests.server.process import ROOT, ServerProcess


@pytest.fixture(autouse=True)
def nobodys_ids() -> Iterator[None]:
    structlog.contextvars.clear_contextvars()
    yield
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for descriptor in (read, write):
        os.close(descriptor)


def line(text: str, name: str = "ryzanstein.test") -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, "", 0, text, (), None)


def test_a_line_is_written_with_the_ids_of_whoever_logs_it(pipe: tuple[int, int]) -> None:
    journal = Journal(Lines(), pipe[1])
    bind("req-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    journal.emit(line("one"))
    bind("req-2", "")
    journal.emit(line("two"))
    journal.close()
    written = os.read(pipe[0], 1000).decode()
    assert written == "INFO ryzanstein.test: one [req-1]\nINFO ryzanstein.test: two [req-2]\n"


def test_a_pipe_that_nobody_reads_stops_nobody(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 100)
    journal = Journal(Lines(), pipe[1])
    begun = time.monotonic()
    for number in range(3000):
        journal.emit(line(f"{number} " + "x" * 500))
    assert time.monotonic() - begun < 2
    assert journal.dropped > 2000
    journal.close()  # in a second, at most
    assert time.monotonic() - begun < 5
    while journal._thread.is_alive():  # or it would write to whoever gets the descriptor next
        if select.select([pipe[0]], [], [], 0.1)[0]:
            os.read(pipe[0], 1 << 20)


def test_a_full_disk_and_a_closed_pipe_are_counted() -> None:
    for make in (lambda: os.open("/dev/full", os.O_WRONLY), broken_pipe):
        descriptor = make()
        journal = Journal(Lines(), descriptor)
        journal.emit(line("lost"))
        journal.close()
        assert journal.dropped == 1
        os.close(descriptor)


def broken_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def test_the_same_line_again_and_again_is_written_a_few_times(pipe: tuple[int, int]) -> None:
    journal = Journal(Lines(), pipe[1])
    for _ in range(500):
        journal.emit(line("again"))
    journal.emit(line("another"))
    journal._kinds["ryzanstein.test", logging.INFO, "again"] = (time.monotonic() - 60, 500)
    journal.emit(line("again"))
    journal.close()
    lines = os.read(pipe[0], 1 << 16).decode().splitlines()
    assert len(lines) == MOST_ALIKE + 2
    assert lines[-1].endswith(f"again (and {500 - MOST_ALIKE} more like it)")


def test_json_lines_follow_the_elastic_common_schema(mock_server: MockFactory) -> None:
    trace = "00-" + "1" * 31 + "2-" + "3" * 16 + "-00"
    env = {"MOCK_LOGGING": json.dumps({"format": "json", "requests": True})}
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        body = {"model": "mock", "prompt": "a secret prompt", "max_tokens": 5}
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"traceparent": trace}
        )
        assert answer.headers["x-trace-id"] == "1" * 31 + "2"
        httpx.get(f"{server.url}/test/raise", headers={"x-request-id": "mine"})
        log = server.wait_for("ended: length")
        log = server.wait_for("ZeroDivisionError")
    found = [json.loads(text) for text in log.splitlines() if text.startswith("{")]
    ended = next(entry for entry in found if "ended: length" in entry["message"])
    assert ended["trace"]["id"] == "1" * 31 + "2"
    assert ended["http"]["request"]["id"] == answer.json()["id"]
    assert ended["ryzanstein"]["output_tokens"] == 5
    assert ended["log.level"] == "info"
    assert ended["service"]["name"] == "ryzanstein"
    raised = next(entry for entry in found if "error" in entry)
    assert raised["http"]["request"]["id"] == "mine"
    assert raised["error"]["type"] == "ZeroDivisionError"
    assert "stack_trace" in raised["error"]
    assert {entry["ecs.version"] for entry in found}
    assert "secret prompt" not in log


def ask_for_two(server: ServerProcess, secret: str) -> tuple[str, list[str]]:
    """Two answers to one prompt, one of them cut by its client; the first one's id and texts."""
    body = {"model": "mock", "prompt": secret, "max_tokens": 40, "n": 2, "stop": ["q"]}
    done = httpx.post(f"{server.url}/v1/completions", json=body).json()
    body = {"model": "mock", "prompt": f"cut {secret}", "max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    return done["id"], [choice["text"] for choice in done["choices"]]


@pytest.mark.parametrize("kind", ["text", "json"])
def test_prompts_and_answers_are_in_each_requests_line_where_that_is_set(kind: str) -> None:
    secret = 'so private\nthat "nobody" should see it: é'
    env = {
        "MOCK_LOGGING": json.dumps({"format": kind, "prompts": True}),
        "MOCK_ENGINE": json.dumps({"delay": 0.005, "pages": 256, "context": 500}),
    }
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        assert "PROMPTS AND ANSWERS ARE LOGGED" in server.wait_for("PROMPTS AND ANSWERS")
        made, texts = ask_for_two(server, secret)
        log = server.wait_for("ended: abort")
    ended = [entry for entry in log.splitlines() if " ended: " in entry]
    assert len(ended) == 2
    if kind == "json":
        said = [json.loads(entry) for entry in ended]
        assert said[0]["http"]["request"]["id"] == made
        assert said[0]["ryzanstein"]["prompt"] == secret
        answers = said[0]["ryzanstein"]["answers"]
        assert said[1]["ryzanstein"]["prompt"] == f"cut {secret}"
        assert len(said[1]["ryzanstein"]["answers"][0]) >= 1
    else:
        assert f"prompt {secret!r}, answers [" in ended[0]
        assert f"prompt {'cut ' + secret!r}, answers [" in ended[1]
        answers = ast.literal_eval(ended[0].partition(", answers ")[2].rpartition(" [")[0])
    # As the model wrote them, with what stopped them.
    assert [answer.partition("q")[0] for answer in answers] == texts


@pytest.mark.parametrize("more", [{}, {"requests": True, "level": "debug", "format": "json"}])
def test_prompts_and_answers_are_never_logged_otherwise(more: dict[str, object]) -> None:
    secret = "so private that nobody should see it"
    env = {"MOCK_LOGGING": json.dumps(more), "MOCK_ENGINE": json.dumps({"delay": 0.005})}
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        _, texts = ask_for_two(server, secret)
        httpx.get(f"{server.url}/test/raise")
        server.wait_for("ZeroDivisionError")
    assert "private" not in server.log
    assert not [text for text in texts if text in server.log]
    assert "PROMPTS" not in server.log


def test_tokens_flow_while_nobody_reads_the_log() -> None:
    """A server whose standard error is a full pipe."""
    env = os.environ | {"MOCK_LOGGING": json.dumps({"requests": True})}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.mock_server"],
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        body = {"model": "mock", "prompt": "x", "max_tokens": 2}
        with httpx.Client(base_url=url, timeout=10) as client:
            for _ in range(1500):  # some 100 bytes each; a pipe holds 65,536
                assert client.post("/v1/completions", json=body).status_code == 200
            assert client.get("/health/live").status_code == 200
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_the_settings_are_listed() -> None:
    assert "[logging]" in (Path(ROOT) / "configs/cpu.toml").read_text()
