"""What company does to a stream: a long prompt that arrives beside it, and a tenant that floods.

    python -m perf.company long --plot long.png
    python -m perf.company flood --plot flood.png

Both start servers of their own and compare settings: `long` with and without the budget of time,
`flood` with the flooder's requests in the guest's own queue, as a tenant, and as a tenant that is
held to half of the slots.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from perf.load import WORDS

TENANTS = """
[tenants.guest]
keys = ["guest"]
[tenants.flood]
keys = ["flood"]
max_running = {cap}
"""
Panels = dict[str, tuple[list[float], list[float], float]]


@dataclass
class Stream:
    """When a request was sent, and when its events came."""

    sent: float
    events: list[float] = field(default_factory=list)
    status: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.sent

    def gaps(self) -> list[tuple[float, float]]:
        """(when, how long) of every gap between two events."""
        return [(b, b - a) for a, b in itertools.pairwise(self.events)]


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """A server of one's own, on a free port."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        try:
            for line in process.stderr:
                log += line
                if found := re.search(r"address +(http://\S+)", line):
                    yield found[1]
                    break
            else:
                raise SystemExit(f"the server did not start:\n{log}")
        finally:
            process.terminate()
            process.communicate()


async def ask(client: httpx.AsyncClient, prompt: str, tokens: int, key: str = "none") -> Stream:
    """One streamed completion."""
    body = {"model": "smollm2-135m", "prompt": prompt, "max_tokens": tokens, "stream": True}
    body |= {"ignore_eos": True, "temperature": 0}
    stream = Stream(time.perf_counter())
    headers = {"authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        stream.status = response.status_code
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                stream.events.append(time.perf_counter())
    return stream


def words(chance: random.Random, count: int) -> str:
    """About as many tokens, all different from anybody else's."""
    return f"{chance.randrange(10**6)} " + " ".join(chance.choice(WORDS) for _ in range(count))


async def beside_long_prompt(url: str, streams: int) -> tuple[list[Stream], Stream, Stream]:
    """Steady streams; after a while a prompt of 4,000 tokens, and right behind it one of 20."""
    chance = random.Random(0)
    steady: list[Stream] = []
    late: list[Stream] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def run(into: list[Stream], prompt: str, tokens: int) -> None:
            into.append(await ask(client, prompt, tokens))

        async with anyio.create_task_group() as group:
            for _ in range(streams):
                group.start_soon(run, steady, words(chance, 60), 700)
            await anyio.sleep(4)
            long = words(chance, 3900)
            group.start_soon(run, late, long, 2)
            await anyio.sleep(0.1)
            short: list[Stream] = []
            group.start_soon(run, short, words(chance, 15), 2)
        return steady, late[0], short[0]


def percentile(values: list[float], which: float) -> float:
    return float(np.percentile(values, which)) * 1e3 if values else float("nan")


app = App(name="perf.company", help=__doc__, help_format="plaintext")


@app.command
def long(
    *,
    streams: int = 8,
    target: Annotated[str, Parameter(help="Targets to compare, with commas.")] = "0,250",
    plot_file: Annotated[Path | None, Parameter(name="--plot")] = None,
) -> None:
    """A prompt of 4,000 tokens beside steady streams, and a short one behind it."""
    columns = ("target ms", "quiet p50", "quiet p99", "p50 beside it", "p99 beside it")
    table = Table(*columns, "long TTFT", "short TTFT")
    panels: Panels = {}
    for milliseconds in target.split(","):
        with server("--target-itl-ms", milliseconds) as url:
            steady, late, short = anyio.run(beside_long_prompt, url, streams)
        gaps = sorted(gap for stream in steady for gap in stream.gaps())
        begin, end = late.sent, late.events[0]
        quiet = [gap for when, gap in gaps if begin - 2 < when < begin]
        beside = [gap for when, gap in gaps if begin < when < end]
        figures = [percentile(v, p) for v in (quiet, beside) for p in (50, 99)]
        row = [*figures, late.ttft * 1e3, short.ttft * 1e3]
        table.add_row(milliseconds, *(f"{value:.1f}" for value in row))
        panels[f"target {milliseconds} ms"] = (
            [when - begin for when, _ in gaps],
            [gap * 1e3 for _, gap in gaps],
            end - begin,
        )
    Console(width=120).print(table)
    if plot_file is not None:
        plot_gaps(panels, plot_file)


@app.command
def flood(
    *,
    seconds: float = 30.0,
    running: int = 16,
    target: float = 40.0,
    requests: int = 1000,
    plot_file: Annotated[Path | None, Parameter(name="--plot")] = None,
) -> None:
    """A guest's time to first token while another tenant sends everything at once."""
    table = Table("setting", "guest TTFT p50", "p90", "p99", "guest requests", "flood answers/s")
    series: dict[str, list[float]] = {}
    for name, cap, key in (
        ("flooder held to half", running // 2, "flood"),
        ("flooder is a tenant", 0, "flood"),
        ("no tenants: one queue", 0, "guest"),
    ):
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(TENANTS.format(cap=cap))
            file.flush()
            options = ("--set", f"scheduler.max_running={running}", "--tenants", file.name)
            with server(*options, "--target-itl-ms", str(target)) as url:
                guests, answers = anyio.run(flooded, url, key, seconds, requests)
        series[name] = ttfts = sorted(s.ttft for s in guests if s.events)
        row = [percentile(ttfts, p) for p in (50, 90, 99)]
        served = f"{len(ttfts)} of {len(guests)}"
        table.add_row(name, *(f"{v:.0f}" for v in row), served, f"{answers / seconds:.1f}")
    Console(width=120).print(table)
    if plot_file is not None:
        plot_shares(series, plot_file)


async def flooded(url: str, key: str, seconds: float, requests: int) -> tuple[list[Stream], int]:
    """The guest's requests, and how many answers the flooder got meanwhile."""
    chance = random.Random(1)
    guests: list[Stream] = []
    answers = 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one_of_flood(prompt: str) -> None:
            nonlocal answers
            stream = await ask(client, prompt, 64, key)
            answers += bool(stream.events)

        async def guest(prompt: str) -> None:
            stream = Stream(time.perf_counter())
            guests.append(stream)  # also if it never gets an answer
            done = await ask(client, prompt, 32, "guest")
            stream.events, stream.status = done.events, done.status

        with anyio.move_on_after(seconds + 5):
            async with anyio.create_task_group() as group:
                for _ in range(requests):
                    group.start_soon(one_of_flood, words(chance, 45))
                await anyio.sleep(5)
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    group.start_soon(guest, words(chance, 45))
                    await anyio.sleep(chance.expovariate(4))
                group.cancel_scope.cancel()
    return guests, answers


def plot_gaps(panels: Panels, file: Path) -> None:
    """Every gap between tokens over time; the long prompt's life is shaded."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 2.6 * len(panels)), sharex=True, layout="constrained"
    )
    for panel, (name, (times, gaps, end)) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        panel.axvspan(0, end, alpha=0.15, color="tab:orange")
        panel.plot(times, gaps, ".", markersize=2)
        panel.set(title=name, ylabel="ms between tokens", yscale="log", xlim=(-2, 8))
        panel.grid(alpha=0.3)
    np.atleast_1d(axes)[-1].set(xlabel="seconds since the long prompt was sent")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def plot_shares(series: dict[str, list[float]], file: Path) -> None:
    """Cumulative distributions of the guest's time to first token."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in series.items():
        panel.plot([v * 1e3 for v in values], np.linspace(0, 1, len(values)), label=name)
    panel.set(xscale="log", xlabel="guest's time to first token (ms)", ylabel="share of requests")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    app()
