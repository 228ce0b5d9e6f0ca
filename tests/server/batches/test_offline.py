"""Batches from the shell."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from engine import ConfigError, EngineFailed
from engine.config import BatchSection
from server.batches.database import Row
from server.batches.offline import run_batch
from server.cli import app
from tests.mock import continuation, mock_engine
from tests.tiny import write_llama


def write(path: Path, count: int, url: str = "/v1/completions", **body: Any) -> Path:
    lines = []
    for number in range(count):
        request = {"model": "mock", "prompt": f"prompt {number}", "max_tokens": 6, **body}
        line = {"custom_id": f"c{number}", "method": "POST", "url": url, "body": request}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def run(source: Path, target: Path, delay: float = 0.0, seconds: float = 30.0) -> Row | None:
    engine, executor = mock_engine(pages=256)
    executor.delay = delay
    found = None
    with anyio.move_on_after(seconds):
        async with engine:
            console = Console(quiet=True)
            found = await run_batch(engine, None, source, target, BatchSection(), console)
    return found


async def test_every_line_is_answered_in_its_order(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 9)
    with source.open("a") as file:
        bad = {"model": "mock", "prompt": "x", "max_tokens": -1}
        line = {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": bad}
        file.write("\n" + json.dumps(line) + "\n")
    batch = await run(source, tmp_path / "out.jsonl")
    assert batch is not None
    assert (batch["completed"], batch["failed"]) == (9, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"c{n}" for n in range(9)] + ["bad"]
    for number, line in enumerate(lines[:9]):
        text = bytes(continuation(list(f"prompt {number}".encode()), 6)).decode()
        assert line["response"]["body"]["choices"][0]["text"] == text
    assert lines[9]["response"]["status_code"] == 400
    assert names_in(tmp_path) == ["in.jsonl", "out.jsonl"]


async def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    assert await run(source, target, delay=0.06, seconds=1.0) is None
    assert not target.exists()
    engine, executor = mock_engine(pages=256)
    async with engine:
        console = Console(quiet=True)
        batch = await run_batch(engine, None, source, target, BatchSection(), console)
    assert batch["completed"] == 60
    begun = {s.request.id for plan in executor.plans for s in plan.admitted}
    assert 0 < len(begun) < 60
    assert len(target.read_text().splitlines()) == 60


async def test_two_runs_do_not_write_one_target(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    async with anyio.create_task_group() as group:
        group.start_soon(partial(run, source, target, delay=0.02))
        while not target.with_name("out.jsonl.progress").exists():
            await anyio.sleep(0.01)
        with pytest.raises(ConfigError, match="another run-batch is writing"):
            await run(source, target)
    assert len(target.read_text().splitlines()) == 20


async def test_another_input_is_not_mixed_in(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    await run(write(tmp_path / "in.jsonl", 60), target, delay=0.06, seconds=0.5)
    with pytest.raises(ConfigError, match="another input"):
        await run(write(tmp_path / "other.jsonl", 3), target)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "first line is no request"),
        ("{}", "first line is no request"),
        ('{"url": "/v1/moon"}', "url must be one of"),
        ('{"url": "/v1/completions"}', "line 1"),
    ],
)
async def test_a_wrong_input_is_one_sentence(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        await run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]  # noqa: ASYNC240
    write(tmp_path / "in.jsonl", 2)
    await run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_llama(tmp_path / "tiny")
    source = write(tmp_path / "in.jsonl", 3, model="tiny")
    target = tmp_path / "out.jsonl"
    command = ["run-batch", str(source), str(target), "--model", str(model)]
    assert app([*command, "--set", "cache.tokens=2048"], result_action="return_value") == 0
    first = target.read_text()
    assert len(first.splitlines()) == 3
    target.unlink()
    app([*command, "--set", "cache.tokens=2048"], result_action="return_value")
    texts = [
        [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in out.splitlines()]
        for out in (first, target.read_text())
    ]
    assert len(texts[0]) == 3
    assert "3 answered" in capsys.readouterr().err


async def test_it_ends_if_the_model_has_failed_for_good(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    engine, executor = mock_engine(pages=256)
    executor.delay = 0.01

    async def break_it() -> None:
        while engine.health() != "failed":
            executor.error = RuntimeError("broken")
            await anyio.sleep(0.005)

    async with engine, anyio.create_task_group() as group:
        group.start_soon(break_it)
        with anyio.fail_after(20), pytest.raises(EngineFailed, match="steps in a row"):
            await run_batch(engine, None, source, target, BatchSection(), Console(quiet=True))
    assert not target.exists()
