"""`ryzanstein top`."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import httpx
import pytest
from rich.console import Console

from engine import ConfigError
from server.top import Reading, Screen, quantile, read, sparks, watch
from tests.server.conftest import MockFactory
from tests.server.process import ROOT


def reading(at: float, **buckets: float) -> Reading:
    bounds = {"a": "0.1", "b": "0.2", "c": "+Inf"}
    name = "ryzanstein_x_bucket"
    return Reading(at, {(name, (("le", bounds[k]),)): v for k, v in buckets.items()})


def test_quantiles_are_those_of_the_time_between_two_looks() -> None:
    before, now = reading(0.0, a=100, b=100, c=100), reading(1.0, a=110, b=120, c=120)
    assert quantile(before, now, "x", 0.5) == pytest.approx(0.1)
    assert quantile(before, now, "x", 0.75) == pytest.approx(0.15)
    assert quantile(now, now, "x", 0.5) is None
    assert quantile(before, reading(1.0, a=100, b=100, c=101), "x", 0.5) == 0.2


def test_a_line_of_the_past_is_full_where_most_was() -> None:
    assert sparks([0.0, 5.0, 10.0]) == " ▄█"


def test_a_busy_server_is_drawn(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.03)
    body = {"model": "mock", "prompt": "abc", "max_tokens": 50}
    asking = threading.Thread(
        target=lambda: httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    )
    asking.start()
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    watch(server.url, 0.3, console, frames=2)
    asking.join()
    file = console.file
    assert isinstance(file, io.StringIO)
    shown = file.getvalue()
    for text in ("state", "ok", "tokens/s", "1 run, 0 wait", "next token", "99th percentile"):
        assert text in shown, text


def test_tenants_are_listed_once_there_are_several() -> None:
    samples = {("ryzanstein_tenant_waiting", (("tenant", name),)): 1.0 for name in ("alice", "bob")}
    made = Reading(1.0, samples)
    console = Console(file=io.StringIO(), width=100)
    console.print(Screen("url").draw(made, made))
    assert "alice" in console.file.getvalue()  # type: ignore[attr-defined]


def test_no_server_is_one_line_and_status_one() -> None:
    with pytest.raises(ConfigError, match="no server answers"):
        read("http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "top", "--url", "http://127.0.0.1:9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no server answers")
