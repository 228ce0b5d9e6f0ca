"""Two servers under the same load, one at a time, alternating: medians and their ratios.

    python -m perf.compare --url http://127.0.0.1:8000 --against http://127.0.0.1:8080

Both servers are up all the while; a machine's mood changes by the minute, so a ratio taken in
turns is worth more than two figures taken one after the other.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import anyio
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from perf.load import SEED_HELP, Settings, drawn_seed, run, served_model, span, summarize

# Figure -> where it lies in a summary, and whether more is better.
FIGURES: dict[str, tuple[tuple[str, ...], bool]] = {
    "output tokens/s": (("output_tokens_per_second",), True),
    "ITL p50 ms": (("itl_ms", "p50"), False),
    "ITL p99 ms": (("itl_ms", "p99"), False),
    "TTFT p50 ms": (("ttft_ms", "p50"), False),
}


def pick(summary: dict[str, Any], path: tuple[str, ...]) -> float:
    """The figure at `path`; NaN where a run had none."""
    value: Any = summary
    for key in path:
        value = value.get(key) if value else None
    return float("nan") if value is None else float(value)


async def alternate(
    sides: list[Settings], streams: int, requests: int, rounds: int, seed: int
) -> list[list[dict[str, Any]]]:
    """Summaries of each side's rounds: A B A B ..."""
    found: list[list[dict[str, Any]]] = [[] for _ in sides]
    for number in range(rounds):
        for side, settings in enumerate(sides):
            outcomes, seconds = await run(
                settings, concurrency=streams, requests=requests, rate=None, seed=seed + number
            )
            summary = summarize(outcomes, seconds, 1.0, 0.1)
            if summary["errors"]:
                raise SystemExit(f"{settings.url}: {summary['first_error']}")
            found[side].append(summary)
    return found


def compare(
    streams: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> dict[str, Any]:
    """One row of the table: both medians of each figure, and ours divided by theirs."""
    row: dict[str, Any] = {"streams": streams}
    for name, (path, _) in FIGURES.items():
        mine, other = (statistics.median(pick(s, path) for s in side) for side in (ours, theirs))
        row[name] = {"ours": round(mine, 2), "theirs": round(other, 2), "ratio": mine / other}
    return row


app = App(name="perf.compare", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    url: str = "http://127.0.0.1:8000",
    against: str = "http://127.0.0.1:8080",
    streams: Annotated[str, Parameter(help="Numbers of clients, with commas.")] = "1,4,8,16,32",
    requests: Annotated[int, Parameter(help="Requests a client and round.")] = 2,
    rounds: int = 3,
    prompt_tokens: Annotated[str, Parameter(help="A length, or a span such as 64-256.")] = "128",
    output_tokens: Annotated[str, Parameter(help="A length, or a span such as 64-256.")] = "128",
    seed: Annotated[int | None, Parameter(help=SEED_HELP)] = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Load both servers in turn at each number of streams, and print one table."""

    async def measure() -> list[dict[str, Any]]:
        base = Settings(url, "", span(prompt_tokens), span(output_tokens), True, None, True)
        sides = [
            replace(base, url=u.rstrip("/"), model=await served_model(u.rstrip("/"), None))
            for u in (url, against)
        ]
        rows, first = [], drawn_seed(seed)
        for count in map(int, streams.split(",")):
            ours, theirs = await alternate(sides, count, count * requests, rounds, first)
            rows.append(compare(count, ours, theirs))
            first += rounds  # else this row's prompts would begin with those of the last
        return rows

    rows = anyio.run(measure)
    table = Table("streams", *FIGURES)
    for row in rows:
        cells = [row[name] for name in FIGURES]
        table.add_row(
            str(row["streams"]),
            *(f"{c['ours']:g} / {c['theirs']:g} = {c['ratio']:.2f}" for c in cells),
        )
    Console(width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    app()
