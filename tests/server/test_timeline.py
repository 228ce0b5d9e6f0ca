"""Where a request's time went."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest

from engine import Decision, RequestStats, SamplingParams
from engine.types import Choice, Ran
from server import timeline as module
from server.timeline import KEPT, Event, Timelines, Told, segments
from tests.mock import mock_engine
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess
from tests.server.stats import ended, step


def shown(events: list[Event], end: float, tokens: int = 0) -> list[tuple[str, str, float]]:
    return [(s.what, s.why, round(s.ms)) for s in segments(events, 10.0, end, tokens)]


def decided(kind: str, at: float, reason: str = "") -> Event:
    return Event(kind, at, at, reason)


def ran(at: float, end: float, tokens: int, *, sample: bool = False) -> Event:
    return Event("prefill", at, end, tokens=tokens, sample=sample)


def test_a_life_is_told_without_a_gap() -> None:
    events = [
        decided("wait", 10.1, "batch full"),
        decided("admit", 10.5),
        ran(10.5, 10.6, 512),
        ran(10.8, 10.9, 100, sample=True),
        decided("preempt", 11.9, "no free pages"),
        decided("wait", 12.0, "no free pages"),
        decided("admit", 12.4),
        ran(12.4, 12.5, 620, sample=True),
    ]
    assert shown(events, 13.5) == [
        ("queued", "others are before it", 100),
        ("queued", "batch full", 400),
        ("prefill", "", 100),
        ("in the batch", "the step's time goes to others", 200),
        ("prefill", "", 100),
        ("decode", "", 1000),
        ("preempted", "no free pages", 100),
        ("preempted", "no free pages", 400),
        ("prefill", "", 100),
        ("decode", "", 1000),
    ]
    parts = segments(events, 10.0, 13.5, 40, 1)
    assert {p.index for p in parts} == {1}
    assert [p.tokens for p in parts if p.what == "decode"] == [20, 20]
    assert [p.tokens for p in parts if p.what == "prefill"] == [512, 100, 620]
    assert sum(p.ms for p in parts) == pytest.approx(3500)


def test_one_that_never_began_was_queued_all_the_time() -> None:
    assert shown([], 10.2) == [("queued", "others are before it", 200)]


def test_what_a_step_still_does_after_the_end_adds_nothing() -> None:
    assert shown([decided("admit", 10.0), ran(10.0, 10.4, 9)], 10.1) == [("prefill", "", 100)]


def stats(number: int, finished: float) -> RequestStats:
    return ended(f"r{number}", finished, choices=(Choice(0, 0, finished, "stop"),))


def told(timelines: Timelines, name: str) -> list[Told]:
    record = timelines.record(name)
    assert record is not None
    assert record.stats is not None
    return timelines.told(record, record.stats.arrival, record.stats.choices)


def test_what_has_ended_is_kept_for_an_hour_and_not_without_end() -> None:
    timelines = Timelines(lambda: 0.0)
    timelines.on_request(stats(0, 100.0))
    timelines.on_request(stats(1, 3000.0))
    assert timelines.record("r0") is not None
    timelines.on_request(stats(2, 3800.0))
    assert timelines.record("r0") is None
    assert timelines.record("r1") is not None
    for number in range(KEPT + 5):
        timelines.on_request(stats(number + 10, 3800.0))
    assert timelines.record("r2") is None


def test_a_step_that_comes_behind_the_end_is_still_noted() -> None:
    """Requests are reported before the step that finished them."""
    timelines = Timelines(lambda: 0.0)
    timelines.on_request(stats(1, 2.0))
    last = step(
        2.0,
        rows=0,
        seconds={"wait": 0.5},
        decisions=(Decision("admit", "r1", "", 1.0),),
        prefills=(Ran("r1", 0, 4, True),),
    )
    timelines.on_step(last)
    (one,) = told(timelines, "r1")
    parts = [(s.what, round(s.ms)) for s in one.segments]
    assert parts == [("queued", 1000), ("in the batch", 500), ("prefill", 500)]


def test_choices_have_their_own_time_and_their_own_share_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first ends early, the second is preempted; of the third not all could be kept."""
    monkeypatch.setattr(module, "MOST_EVENTS", 8)
    timelines = Timelines(lambda: 0.0)
    for at, index, kind in (
        *((1.0, 0, "admit"), (1.0, 1, "admit"), (1.0, 2, "admit")),
        *((4.0, 1, "preempt"), (6.0, 1, "admit"), (6.0, 2, "preempt"), (7.0, 2, "admit")),
    ):
        decision = Decision(kind, "r1", "why", at, index)
        timelines.on_step(step(at, rows=0, decisions=(decision,)))
    piece = Ran("r1", 0, 4, True, 0)
    timelines.on_step(step(2.0, rows=0, seconds={"wait": 0.5}, prefills=(piece,)))
    late = Decision("preempt", "r1", "why", 8.0, 2)
    timelines.on_step(step(8.0, rows=0, decisions=(late,)))
    ended = stats(1, 10.0)
    choices = (Choice(0, 9, 5.0, "stop"), Choice(1, 9, 10.0, "stop"), Choice(2, 9, 10.0, "length"))
    timelines.on_request(msgspec.structs.replace(ended, choices=choices))
    first, second, third = told(timelines, "r1")
    assert [p.what for p in first.segments] == ["queued", "in the batch", "prefill", "decode"]
    assert (first.total_ms, first.explained, first.segments[-1].tokens) == (5000, 1.0, 9)
    assert [p.what for p in second.segments] == [
        "queued",
        "in the batch",
        "preempted",
        "in the batch",
    ]
    assert (second.total_ms, second.explained) == (10_000, 1.0)
    assert (third.total_ms, third.explained) == (10_000, 0.8)
    assert [part.index for part in third.segments] == [2] * 4


async def test_while_its_reader_wants_nothing_an_answer_is_set_aside() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.01
    timelines = Timelines(time.monotonic)
    engine.add_listener(timelines)
    async with engine:
        stream = await engine.submit("abcd", SamplingParams(max_tokens=20))
        (name,) = stream.request_ids
        await anyio.sleep(0.05)
        engine.pause(name)
        await anyio.sleep(0.5)
        engine.unpause(name)
        async for _ in stream:
            pass
        await anyio.sleep(0.1)
    (one,) = told(timelines, name)
    parts = [(s.what, s.ms) for s in one.segments if s.what in ("decode", "set aside")]
    assert [what for what, _ in parts] == ["decode", "set aside", "decode"]
    assert 400 < parts[1][1] < 600
    assert one.explained == 1.0


def timeline(server: ServerProcess, answer: str, key: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{server.url}/v1/requests/{answer}/timeline", headers=headers)


def test_over_http_while_it_runs_and_afterwards(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01, max_running=1)
    answers: list[str] = []

    def ask() -> None:
        body = {"model": "mock", "prompt": "abc", "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    found = json.loads(line[6:])["id"]
                    if found not in answers:
                        answers.append(found)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not answers:
        time.sleep(0.005)
    live = timeline(server, answers[0]).json()["requests"][0]
    assert live["state"] == "running"
    for thread in threads:
        thread.join()
    whats = set()
    for answer in answers:
        found = timeline(server, answer).json()["requests"][0]
        assert (found["state"], found["finish_reason"]) == ("finished", "length")
        assert found["explained"] >= 0.99
        spent = sum(part["ms"] for part in found["segments"])
        assert spent == pytest.approx(found["total_ms"], abs=0.01)
        assert found["completion_tokens"] == 20
        whats |= {(part["what"], part.get("why", "")) for part in found["segments"]}
    assert {("queued", "batch full"), ("prefill", ""), ("decode", "")} <= whats
    assert timeline(server, "cmpl-nobody").status_code == 404


def test_each_of_several_choices_is_told_by_itself(mock_server: MockFactory) -> None:
    """Three choices where two fit at once: the last waits until one of the others has ended."""
    server = mock_server(delay=0.01, max_running=2)
    body = {"model": "mock", "prompt": "abc", "max_tokens": 20, "n": 3}
    made = httpx.post(f"{server.url}/v1/completions", json=body).json()["id"]
    (found,) = timeline(server, made).json()["requests"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    for choice in found["choices"]:
        own = [part for part in found["segments"] if part["index"] == choice["index"]]
        assert own[0]["from_ms"] == 0
        for before, after in pairwise(own):
            assert after["from_ms"] == pytest.approx(before["from_ms"] + before["ms"], abs=0.01)
        assert sum(part["ms"] for part in own) == pytest.approx(choice["total_ms"], abs=0.01)
        assert choice["explained"] >= 0.99
        assert (choice["completion_tokens"], choice["finish_reason"]) == (20, "length")
        decoded = sum(part["tokens"] for part in own if part["what"] == "decode")
        assert decoded == 20
    first, second, last = found["choices"]
    assert max(first["total_ms"], second["total_ms"]) < 0.8 * last["total_ms"]
    waited = [p["ms"] for p in found["segments"] if p["index"] == 2 and p["what"] == "queued"]
    assert sum(waited) > 100
    assert found["total_ms"] == last["total_ms"]
    assert found["completion_tokens"] == 60


def test_it_is_shown_to_its_owner_and_to_the_operator(
    mock_server: MockFactory, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.a]\nkeys = ["key-a"]\n[tenants.b]\nkeys = ["key-b"]\n')
    server = mock_server({"tenants_file": str(file), "api_keys": ["operator"]})
    body = {"model": "mock", "prompt": ["abc", "de"], "max_tokens": 3}
    headers = {"authorization": "Bearer key-a"}
    made = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).json()["id"]
    assert len(timeline(server, made, "key-a").json()["requests"]) == 2
    assert timeline(server, made, "operator").status_code == 200
    assert timeline(server, made, "key-b").status_code == 404
    assert timeline(server, made).status_code == 401
