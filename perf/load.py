"""Load generator for any OpenAI-compatible server: throughput and latency, as a client sees them.

    python -m perf.load --url http://127.0.0.1:8000 --concurrency 8 --requests 64

Closed loop by default (each of C clients sends its next request when the last one ends); with
`--rate R` requests arrive at random, R a second on average (Poisson), whatever the server does.
Prompts are all different. Output tokens come from the server's `usage`, since one event may carry
several tokens; inter-token latency spreads the time between two events over the tokens between.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from perf.wire import post

WORDS = """
time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work
number night point home water room mother area money story fact month lot right study
book eye job word business issue side kind head house service friend father power hour
game line end member law
""".split()  # noqa: SIM905
TIMEOUT = 600.0
SEED_HELP = "Draws the prompts of an earlier run again, which a server may have cached."


@dataclass
class Settings:
    """What to send, and where."""

    url: str
    model: str
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    chat: bool
    api_key: str | None
    ignore_eos: bool


@dataclass
class Outcome:
    """One request; times are seconds since it was sent."""

    sent: float
    ttft: float | None = None
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class Sizer:
    """Makes distinct prompts of about the wanted length, by measuring tokens per word once."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokens_per_word = 1.2
        self._overhead = 0.0
        self._count = 0

    def prompt(self, tokens: int) -> str:
        self._count += 1
        words = max(1, round((tokens - self._overhead) / self._tokens_per_word) - 2)
        body = " ".join(self._random.choice(WORDS) for _ in range(words))
        # The number comes first, so that no two prompts share a prefix.
        return f"{self._count} {self._random.randrange(10**6)} {body}"

    async def calibrate(self, settings: Settings) -> None:
        """Fit tokens = overhead + slope * words from two short requests."""
        points = []
        for words in (20, 120):
            body = " ".join(self._random.choice(WORDS) for _ in range(words))
            outcome = await request(settings, body, 1)
            if outcome.error is not None:
                raise SystemExit(f"the server does not serve: {outcome.error}")
            points.append((words, outcome.prompt_tokens))
        (w1, t1), (w2, t2) = points
        self._tokens_per_word = (t2 - t1) / (w2 - w1)
        self._overhead = t1 - self._tokens_per_word * w1


async def request(settings: Settings, prompt: str, max_tokens: int) -> Outcome:
    """Send one streaming request and time its events."""
    body: dict[str, Any] = {
        "model": settings.model,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }
    if settings.ignore_eos:
        body["ignore_eos"] = True
    if settings.chat:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": prompt}]
    else:
        path, body["prompt"] = "completions", prompt
    start = time.perf_counter()
    outcome = Outcome(sent=start)
    events: list[float] = []
    try:
        with anyio.fail_after(TIMEOUT):
            answer = await post(
                f"{settings.url}/v1/{path}", _headers(settings.api_key), json.dumps(body).encode()
            )
        outcome.total = time.perf_counter() - start
        if answer.status != 200:
            outcome.error = f"HTTP {answer.status}: {answer.text()[:400]}"
            return outcome
        # Read only now: what a client does between two tokens is taken from the server.
        for at, data in answer.events():
            if data != b"[DONE]":
                _take(json.loads(data), at - start, outcome, events)
    except (OSError, ValueError) as error:  # a timeout is an OSError
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    if not outcome.output_tokens:
        outcome.error = outcome.error or "the stream ended without usage"
        return outcome
    _spread(outcome, events)
    return outcome


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _take(event: dict[str, Any], at: float, outcome: Outcome, events: list[float]) -> None:
    if "error" in event:
        outcome.error = str(event["error"])[:200]
    if usage := event.get("usage"):
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.output_tokens = usage["completion_tokens"]
    if any(
        c.get("text") or (c.get("delta") or {}).get("content") for c in event.get("choices", ())
    ):
        events.append(at)


def _spread(outcome: Outcome, events: list[float]) -> None:
    """TTFT and the gaps between tokens; fewer events than tokens means some carried several."""
    if not events:
        return
    outcome.ttft = events[0]
    tokens_per_event = max(1.0, (outcome.output_tokens - 1) / max(1, len(events) - 1))
    for before, after in itertools.pairwise(events):
        outcome.gaps.append((after - before) / tokens_per_event)


async def run(
    settings: Settings, *, concurrency: int, requests: int, rate: float | None, seed: int
) -> tuple[list[Outcome], float]:
    """All requests' outcomes, and the seconds from the first sent to the last ended."""
    sizer = Sizer(seed)
    lengths = random.Random(seed + 1)
    outcomes: list[Outcome] = []
    await sizer.calibrate(settings)
    jobs = [
        (sizer.prompt(lengths.randint(*settings.prompt_tokens)),
         lengths.randint(*settings.output_tokens))
        for _ in range(requests)
    ]  # fmt: skip
    with _bar() as bar:
        task = bar.add_task("requests", total=requests)

        async def one(prompt: str, tokens: int) -> None:
            outcomes.append(await request(settings, prompt, tokens))
            bar.advance(task)

        start = time.perf_counter()
        if rate is None:
            await _closed_loop(iter(jobs), concurrency, one)
        else:
            await _open_loop(jobs, rate, random.Random(seed + 2), one)
        return outcomes, time.perf_counter() - start


async def _closed_loop(jobs: Iterator[tuple[str, int]], clients: int, one: Any) -> None:
    async def client() -> None:
        for prompt, tokens in jobs:
            await one(prompt, tokens)

    async with anyio.create_task_group() as group:
        for _ in range(clients):
            group.start_soon(client)


async def _open_loop(
    jobs: list[tuple[str, int]], rate: float, arrivals: random.Random, one: Any
) -> None:
    async with anyio.create_task_group() as group:
        for prompt, tokens in jobs:
            group.start_soon(one, prompt, tokens)
            await anyio.sleep(arrivals.expovariate(rate))


async def loop_seconds(url: str, api_key: str | None) -> float | None:
    """Processor time that the server's event loop has taken, if it says so as ours does."""
    async with httpx.AsyncClient(headers=_headers(api_key), timeout=30) as client:
        response = await client.get(f"{url}/metrics")
    lines = response.text.splitlines() if response.status_code == 200 else []
    found = (line.split() for line in lines if line.startswith("ryzanstein_loop_cpu_seconds_total"))
    return next((float(value) for _, value in found), None)


def summarize(
    outcomes: list[Outcome], seconds: float, ttft_limit: float, itl_limit: float
) -> dict[str, Any]:
    """Every figure, times in milliseconds."""
    good = [o for o in outcomes if o.error is None]
    within = [
        o
        for o in good
        if o.ttft is not None
        and o.ttft <= ttft_limit
        and (not o.gaps or float(np.mean(o.gaps)) <= itl_limit)
    ]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    output = sum(o.output_tokens for o in good)
    return {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "first_error": next((o.error for o in outcomes if o.error), None),
        "seconds": seconds,
        "prompt_tokens": sum(o.prompt_tokens for o in good),
        "output_tokens": output,
        "output_tokens_per_second": output / seconds,
        "requests_per_second": len(good) / seconds,
        "goodput_requests_per_second": len(within) / seconds,
        "ttft_ms": percentiles([o.ttft for o in good if o.ttft is not None]),
        "itl_ms": percentiles([gap for o in good for gap in o.gaps]),
        "e2e_ms": percentiles([o.total for o in good]),
        "client_cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def percentiles(seconds: list[float]) -> dict[str, float] | None:
    """p50, p90, p99 in milliseconds; None without values."""
    if not seconds:
        return None
    values = np.percentile(seconds, (50, 90, 99)) * 1e3
    return dict(zip(("p50", "p90", "p99"), (round(float(v), 2) for v in values), strict=True))


def plot(outcomes: list[Outcome], file: Path, title: str) -> None:
    """TTFT and inter-token latency as cumulative distributions, and tokens over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    good = [o for o in outcomes if o.error is None]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    ttfts = [o.ttft for o in good if o.ttft is not None]
    gaps = [g for o in good for g in o.gaps]
    for axes, values, name in ((left, ttfts, "time to first token"), (middle, gaps, "inter-token")):
        ordered = np.sort(values) * 1e3
        axes.plot(ordered, np.linspace(0, 1, len(ordered)))
        axes.set(xlabel=f"{name} (ms)", ylabel="share of values", ylim=(0, 1))
        axes.grid(alpha=0.3)
    begin = min(o.sent for o in good)
    ends = np.array(sorted((o.sent - begin + o.total, o.output_tokens) for o in good))
    right.plot(ends[:, 0], np.cumsum(ends[:, 1]))
    right.set(xlabel="seconds", ylabel="output tokens of finished requests")
    right.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table("figure", "p50", "p90", "p99")
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        values = summary[name] or {}
        table.add_row(name, *(str(values.get(p, "-")) for p in ("p50", "p90", "p99")))
    console.print(table)
    console.print(
        f"{summary['output_tokens_per_second']:.1f} output tokens/s, "
        f"{summary['requests_per_second']:.2f} requests/s, "
        f"{summary['goodput_requests_per_second']:.2f} within limits, "
        f"{summary['errors']} errors of {summary['requests']}, "
        f"{summary['seconds']:.1f} s, client CPU {summary['client_cpu_seconds']:.1f} s"
    )
    if (loop := summary.get("server_loop_us_per_token")) is not None:
        console.print(f"{loop:.1f} µs of the server's event loop an output token")
    if summary["first_error"]:
        console.print(f"first error: {summary['first_error']}", markup=False, soft_wrap=True)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def span(text: str) -> tuple[int, int]:
    """`128`, or `64-256` for lengths drawn evenly between."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def drawn_seed(seed: int | None) -> int:
    """`seed`, or without one that of prompts that no server has seen before."""
    return random.SystemRandom().randrange(10**9) if seed is None else seed


async def served_model(url: str, api_key: str | None) -> str:
    """The first model that the server lists."""
    async with httpx.AsyncClient(headers=_headers(api_key), timeout=30) as client:
        response = await client.get(f"{url}/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])


app = App(name="perf.load", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    url: str = "http://127.0.0.1:8000",
    concurrency: int = 8,
    requests: int = 64,
    prompt_tokens: Annotated[str, Parameter(help="A length, or a span such as 64-256.")] = "128",
    output_tokens: Annotated[str, Parameter(help="A length, or a span such as 64-256.")] = "128",
    rate: Annotated[float | None, Parameter(help="Arrivals a second; open loop.")] = None,
    model: str | None = None,
    api_key: str | None = None,
    completions: Annotated[bool, Parameter(help="Plain completions instead of chat.")] = False,
    ignore_eos: bool = True,
    ttft_limit_ms: float = 1000,
    itl_limit_ms: float = 100,
    seed: Annotated[int | None, Parameter(help=SEED_HELP)] = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot_file: Annotated[Path | None, Parameter(name="--plot")] = None,
) -> int:
    """Run the load and print the figures; exit status 1 if a request failed."""
    seed = drawn_seed(seed)

    async def measure() -> tuple[list[Outcome], float, float | None]:
        base = url.rstrip("/")
        settings = Settings(
            url=base,
            model=model or await served_model(base, api_key),
            prompt_tokens=span(prompt_tokens),
            output_tokens=span(output_tokens),
            chat=not completions,
            api_key=api_key,
            ignore_eos=ignore_eos,
        )
        before = await loop_seconds(base, api_key)
        outcomes, seconds = await run(
            settings, concurrency=concurrency, requests=requests, rate=rate, seed=seed
        )
        after = await loop_seconds(base, api_key)
        taken = None if before is None or after is None else after - before
        return outcomes, seconds, taken

    outcomes, seconds, loop = anyio.run(measure)
    summary = summarize(outcomes, seconds, ttft_limit_ms / 1e3, itl_limit_ms / 1e3)
    if loop is not None and summary["output_tokens"]:
        summary["server_loop_us_per_token"] = round(loop / summary["output_tokens"] * 1e6, 1)
    summary["settings"] = {
        "url": url,
        "concurrency": concurrency,
        "rate": rate,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seed": seed,
    }
    print_summary(summary, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(summary, indent=2) + "\n")
    if plot_file is not None and any(o.error is None for o in outcomes):
        load = f"{rate}/s" if rate else f"{concurrency} at once"
        plot(outcomes, plot_file, f"{requests} requests, {load}, {prompt_tokens}+{output_tokens}")
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    app()
