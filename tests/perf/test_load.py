"""The load generator against a real server process, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf.load import Outcome, Sizer, _spread, percentiles, summarize
from tests.server.conftest import MockFactory, mock_server
from tests.server.process import ROOT

__all__ = ["mock_server"]


def load(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perf.load", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_closed_loop_figures_and_plot(mock_server: MockFactory, tmp_path: Path) -> None:
    server = mock_server(delay=0.002, pages=2000, context=2000)
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = load(
        "--url", server.url, "--concurrency", "4", "--requests", "10", "--prompt-tokens", "200",
        "--output-tokens", "8-16", "--json", str(file), "--plot", str(picture),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert (figures["requests"], figures["errors"]) == (10, 0)
    assert 80 <= figures["output_tokens"] <= 160
    assert 150 * 10 <= figures["prompt_tokens"] <= 250 * 10
    assert figures["output_tokens_per_second"] > 0
    assert figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["p99"] <= figures["e2e_ms"]["p99"]
    assert figures["itl_ms"]["p50"] > 1
    assert figures["client_cpu_seconds"] > 0
    assert 0 < figures["server_loop_us_per_token"] < 1e6 * figures["seconds"]
    assert "output tokens/s" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_open_loop_sends_at_its_own_rate(mock_server: MockFactory, tmp_path: Path) -> None:
    server = mock_server(delay=0.001, pages=2000, context=2000)
    file = tmp_path / "out.json"
    result = load(
        "--url", server.url, "--rate", "40", "--requests", "20", "--prompt-tokens", "60",
        "--output-tokens", "4", "--completions", "--json", str(file),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert 0.15 < figures["seconds"] < 3
    assert figures["goodput_requests_per_second"] > 0


def test_failures_are_counted_and_named(mock_server: MockFactory) -> None:
    server = mock_server(pages=500, context=1900)
    result = load(
        "--url", server.url, "--requests", "2", "--prompt-tokens", "10", "--output-tokens", "5000"
    )
    assert result.returncode == 1
    assert "2 errors of 2" in result.stdout
    assert "context_length_exceeded" in result.stdout


def test_coalesced_events_spread_their_time_over_the_tokens() -> None:
    outcome = Outcome(sent=0.0, output_tokens=9)
    _spread(outcome, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert outcome.ttft == 0.5
    assert outcome.gaps == pytest.approx([0.05] * 4)


def test_goodput_counts_requests_within_both_limits() -> None:
    outcomes = [
        Outcome(0, ttft=0.1, total=1, gaps=[0.01], output_tokens=10),
        Outcome(0, ttft=2.0, total=3, gaps=[0.01], output_tokens=10),
        Outcome(0, ttft=0.1, total=3, gaps=[0.5], output_tokens=10),
        Outcome(0, error="HTTP 500"),
    ]
    figures = summarize(outcomes, 2.0, ttft_limit=1.0, itl_limit=0.1)
    assert figures["goodput_requests_per_second"] == 0.5
    assert figures["output_tokens_per_second"] == 15
    assert (figures["errors"], figures["first_error"]) == (1, "HTTP 500")


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([0.001 * i for i in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_prompts_are_all_different_from_their_first_token() -> None:
    sizer = Sizer(0)
    prompts = [sizer.prompt(50) for _ in range(200)]
    assert len({p.split()[0] for p in prompts}) == 200
