"""What a running server does, in a terminal: `ryzanstein top`. It only reads `/metrics`."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine import ConfigError

TIMEOUT_SECONDS = 5.0
SPARKS = " ▁▂▃▄▅▆▇█"
WIDTH = 40
STATES = {"ok": "green", "draining": "yellow", "restarting": "yellow", "loading": "yellow"}

Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Reading:
    """All samples of a scrape by name and labels, and when it was made."""

    at: float
    samples: dict[Key, float]

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 if there is none."""
        return self.samples.get((f"ryzanstein_{name}", tuple(sorted(labels.items()))), 0.0)

    def labelled(self, name: str, label: str) -> Iterator[tuple[str, float]]:
        """A label's values with their samples."""
        for (found, labels), value in self.samples.items():
            if found == f"ryzanstein_{name}":
                yield dict(labels)[label], value

    @property
    def state(self) -> str:
        """What the engine is doing."""
        return next((s for s, on in self.labelled("engine_state", "state") if on), "unknown")


def read(url: str) -> Reading:
    """Scrape a server. Raises ConfigError if there is none."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_SECONDS) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"no server answers at {url}: {error}") from error
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith("ryzanstein_")
        for sample in family.samples
    }
    return Reading(time.monotonic(), samples)


def quantile(before: Reading, now: Reading, name: str, share: float) -> float | None:
    """Of what a histogram has observed between two readings, seconds; None if that is nothing."""
    buckets = sorted(
        (float(bound), value - before.value(f"{name}_bucket", le=bound))
        for bound, value in now.labelled(f"{name}_bucket", "le")
    )
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return None
    below, least = 0.0, 0.0
    for bound, count in buckets:
        if count >= share * total:
            if bound == float("inf"):
                return least
            return least + (bound - least) * (share * total - below) / max(count - below, 1e-9)
        below, least = count, bound
    return least


class Screen:
    """Draws readings, the newest against the one before; keeps a line of the past."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._past: list[float] = []

    def draw(self, before: Reading, now: Reading) -> RenderableType:
        """One frame."""
        seconds = max(now.at - before.at, 1e-9)

        def rate(name: str) -> float:
            return (now.value(name) - before.value(name)) / seconds

        tokens = rate("step_tokens_sum")
        self._past = [*self._past[1 - WIDTH :], tokens]
        figures = Table.grid(padding=(0, 3))
        state = now.state
        figures.add_row("state", Text(state, style=STATES.get(state, "bold red")))
        figures.add_row("tokens/s", f"{tokens:,.0f}  {sparks(self._past)}")
        decoded = rate("inter_token_seconds_count")
        figures.add_row(
            "", f"{decoded:,.0f} of answers, {max(0.0, tokens - decoded):,.0f} of prompts"
        )
        figures.add_row(
            "sequences",
            f"{now.value('requests_running'):.0f} run, {now.value('requests_waiting'):.0f} wait",
        )
        used, pages = now.value("kv_pages_used"), max(1.0, now.value("kv_pages"))
        figures.add_row("KV cache", ProgressBar(pages, used, width=WIDTH))
        figures.add_row(
            "", f"{used:,.0f} of {pages:,.0f} pages, {now.value('kv_pages_cached'):,.0f} cached"
        )
        for label, name in (
            ("first token", "time_to_first_token_seconds"),
            ("next token", "inter_token_seconds"),
            ("step", "step_duration_seconds"),
        ):
            figures.add_row(label, _times(before, now, name))
        return Group(Panel(figures, title=self._url, title_align="left"), *_tenants(before, now))


def sparks(values: list[float]) -> str:
    """A line of blocks, the largest value full."""
    most = max([*values, 1e-9])
    return "".join(SPARKS[round(value / most * (len(SPARKS) - 1))] for value in values)


def watch(url: str, seconds: float, console: Console, frames: int = 0) -> None:
    """Draw until interrupted, or so many frames. Raises ConfigError if the server is not there at
    first; one that goes away later is waited for."""
    screen, before = Screen(url), read(url)
    with Live(console=console, auto_refresh=False) as live:
        count = 0
        while not frames or count < frames:
            time.sleep(seconds)
            try:
                now = read(url)
            except ConfigError as error:
                live.update(Panel(Text(str(error), style="bold red")), refresh=True)
                continue
            live.update(screen.draw(before, now), refresh=True)
            before, count = now, count + 1


def _times(before: Reading, now: Reading, name: str) -> str:
    half, most = (quantile(before, now, name, share) for share in (0.5, 0.99))
    if half is None or most is None:
        return "-"
    return f"{1e3 * half:,.1f} ms, 99th percentile {1e3 * most:,.1f} ms"


def _tenants(before: Reading, now: Reading) -> Iterator[RenderableType]:
    """A table of tenants, if there are several."""
    waiting = dict(now.labelled("tenant_waiting", "tenant"))
    if len(waiting) < 2:
        return
    table = Table("tenant", "waiting", "tokens of finished answers/s")
    seconds = max(now.at - before.at, 1e-9)
    for tenant, count in sorted(waiting.items()):
        name, labels = "tenant_tokens_total", {"tenant": tenant, "kind": "output"}
        made = now.value(name, **labels) - before.value(name, **labels)
        table.add_row(tenant or "(no name)", f"{count:.0f}", f"{made / seconds:,.0f}")
    yield table
