"""Eviction policies on request traces, beside Belady's optimum, which knows the future.

    python -m perf.eviction --mooncake mooncake_conversation_trace.jsonl --plot eviction.png

Mooncake's trace names the content of every block of 512 tokens. Azure's has lengths and times only:
conversations are made of it, each request a turn of one of them, in the order of arrival. Without
files a synthetic load of Zipf-popular beginnings and conversations is used. The figure is tokens
found, as a share of all tokens asked for; a block counts only while all before it are found.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from engine.scheduling.eviction import POLICIES
from engine.scheduling.pages import PagePool

# A request, as the names of its blocks, first to last.
Trace = list[list[bytes]]
NAMES = [*POLICIES, "adaptive"]
AZURE_BLOCK = 128


def mooncake(file: Path, requests: int) -> Trace:
    """Blocks as the trace names them."""
    lines = file.read_text().splitlines()[:requests]
    return [[_name(block) for block in json.loads(line)["hash_ids"]] for line in lines]


def azure(file: Path, requests: int, seed: int) -> Trace:
    """Conversations: a request goes on with one whose text so far is what its prompt begins with,
    if there is one that fits, three times out of four."""
    chance = random.Random(seed)
    open_ones: list[tuple[int, list[bytes]]] = []
    numbers = itertools.count()
    trace: Trace = []
    with file.open() as rows:
        for row in itertools.islice(csv.DictReader(rows), requests):
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            fitting = [c for c in open_ones if c[0] <= prompt]
            blocks: list[bytes] = []
            if fitting and chance.random() < 0.75:
                before = max(fitting, key=lambda c: c[0])
                open_ones.remove(before)
                blocks = before[1]
            blocks = blocks[: prompt // AZURE_BLOCK]
            blocks = blocks + _fresh(numbers, prompt // AZURE_BLOCK - len(blocks))
            trace.append(blocks)
            said = (prompt + output) // AZURE_BLOCK - len(blocks)
            open_ones.append((prompt + output, blocks + _fresh(numbers, said)))
            del open_ones[:-400]
    return trace


def synthetic(requests: int, seed: int) -> Trace:
    """Beginnings by Zipf's law, and conversations that go on for a while."""
    chance = random.Random(seed)
    numbers = itertools.count()
    beginnings = [_fresh(numbers, chance.randint(1, 12)) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(beginnings))]
    conversations: list[list[bytes]] = []
    trace: Trace = []
    for _ in range(requests):
        if conversations and chance.random() < 0.6:
            turn = conversations.pop(chance.randrange(len(conversations)))
        else:
            turn = list(chance.choices(beginnings, weights)[0])
        turn = turn + _fresh(numbers, chance.randint(1, 4))
        trace.append(turn)
        if chance.random() < 0.7:
            conversations.append(turn)
    return trace


def _fresh(numbers: Iterator[int], count: int) -> list[bytes]:
    return [_name(-1 - next(numbers)) for _ in range(max(0, count))]


def _name(block: int) -> bytes:
    # Spread, since the shadow caches sample by the first byte.
    return (block * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big")


def replay(trace: Trace, capacity: int, policy: Any) -> float:
    """The share of blocks found by the real pool, one request after another."""
    pool = PagePool(capacity, 1, policy)
    found = total = 0
    for blocks in trace:
        held = pool.match(blocks[:capacity])
        found += len(held)
        total += len(blocks)
        for depth in range(len(held), min(len(blocks), capacity)):
            page = pool.allocate(1)
            assert page is not None
            pool.publish(page[0], blocks[depth], depth)
            held += page
        pool.release(held)
    return found / total


def belady(trace: Trace, capacity: int) -> float:
    """The share that the optimum finds: who is used again last goes first (Belady, 1966)."""
    uses: dict[bytes, list[int]] = defaultdict(list)
    for time, blocks in enumerate(trace):
        for block in blocks:
            uses[block].append(time)
    for times in uses.values():
        times.reverse()
    cached: dict[bytes, int] = {}
    heap: list[tuple[int, int, bytes]] = []
    found = total = 0
    for time, blocks in enumerate(trace):
        running = True
        for depth, block in enumerate(blocks):
            while uses[block] and uses[block][-1] <= time:
                uses[block].pop()
            following = uses[block][-1] if uses[block] else len(trace)
            running = running and block in cached
            found += running
            total += 1
            cached[block] = following
            # Of those used again together the end of the chain is worth least.
            heapq.heappush(heap, (-following, -depth, block))
        while len(cached) > capacity:
            following, _, block = heapq.heappop(heap)
            if cached.get(block) == -following:
                del cached[block]
    return found / total


def measure(trace: Trace, capacities: Sequence[int]) -> list[dict[str, float]]:
    """Every policy and the optimum, at every capacity in blocks."""
    return [
        {"blocks": capacity, "belady": belady(trace, capacity)}
        | {name: replay(trace, capacity, name) for name in NAMES}
        for capacity in capacities
    ]


def show(name: str, rows: list[dict[str, float]], console: Console) -> None:
    """Shares of the optimum's hits."""
    table = Table("blocks", "Belady hits", *(f"{n} / Belady" for n in NAMES), title=name)
    for row in rows:
        best = row["belady"]
        shares = [f"{row[n] / best:.1%}" if best else "-" for n in NAMES]
        table.add_row(f"{row['blocks']:,}", f"{best:.1%}", *shares)
    console.print(table)


def plot(results: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Hit rate over capacity, one panel a trace."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axes, (name, rows) in zip(panels[0], results.items(), strict=True):
        blocks = [row["blocks"] for row in rows]
        axes.plot(blocks, [row["belady"] for row in rows], "k--", label="Belady")
        for policy in NAMES:
            axes.plot(blocks, [row[policy] for row in rows], marker=".", label=policy)
        axes.set(title=name, xlabel="blocks in the pool", ylabel="tokens found", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


app = App(name="perf.eviction", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    mooncake_file: Annotated[Path | None, Parameter(name="--mooncake")] = None,
    azure_file: Annotated[Path | None, Parameter(name="--azure")] = None,
    requests: int = 4000,
    seed: int = 0,
    plot_file: Annotated[Path | None, Parameter(name="--plot")] = None,
) -> None:
    """Print a table for each trace."""
    traces = {"synthetic": synthetic(requests, seed)}
    if mooncake_file is not None:
        traces["Mooncake conversations"] = mooncake(mooncake_file, requests)
    if azure_file is not None:
        traces["Azure lengths as conversations"] = azure(azure_file, requests, seed)
    results = {}
    for name, trace in traces.items():
        distinct = len({block for blocks in trace for block in blocks})
        capacities = [max(1, int(distinct * share)) for share in (0.02, 0.05, 0.1, 0.2, 0.4)]
        results[name] = measure(trace, capacities)
        show(f"{name}: {len(trace):,} requests", results[name], Console(width=120))
    if plot_file is not None:
        plot(results, plot_file)


if __name__ == "__main__":
    app()
