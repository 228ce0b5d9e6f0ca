"""What readers that stall do to those that read: 500 of them beside 8 normal streams.

    python -m perf.readers --stalled 500

The stalled ones are WebSocket streams that grant a few events and then nothing; some take one more
event every ten seconds. Rounds without and with them alternate on one server.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
from contextlib import AsyncExitStack
from typing import Any

import anyio
import httpx
from cyclopts import App
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect

from perf.company import Stream, ask, percentile, server, words

NORMAL = 8


async def normal(url: str, tokens: int) -> list[Stream]:
    """Steady streams that are read at once."""
    chance = random.Random(1)
    streams: list[Stream] = []

    async def run(client: httpx.AsyncClient) -> None:
        streams.append(await ask(client, words(chance, 60), tokens))

    client = httpx.AsyncClient(base_url=url, timeout=300)
    async with client, anyio.create_task_group() as group:
        for _ in range(NORMAL):
            group.start_soon(run, client)
    return streams


async def metric(url: str, name: str) -> float:
    """One of the server's gauges."""
    async with httpx.AsyncClient(base_url=url) as client:
        text = (await client.get("/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith(f"ryzanstein_{name} "))
    return float(line.split()[1])


async def stall(url: str, stack: AsyncExitStack, count: int) -> list[ClientConnection]:
    """Connections whose streams stall; returns when the scheduler has set all of them aside."""
    sockets = []
    for number in range(count):
        address = f"{url.replace('http', 'ws')}/v1/responses"
        socket = await stack.enter_async_context(
            connect(address, subprotocols=["ryzanstein.v1"], ping_interval=None)  # type: ignore[list-item]
        )
        body: dict[str, Any] = {"max_output_tokens": 400, "ignore_eos": True}
        messages = (
            {"type": "flow.credit", "stream_id": "s", "events": 2},
            {"type": "response.create", "stream_id": "s", "input": f"Count to {number}", **body},
        )
        for message in messages:
            await socket.send(json.dumps(message))
        sockets.append(socket)
    await quiet(url)
    return sockets


async def quiet(url: str) -> None:
    """Until nothing runs and nothing waits."""
    while await metric(url, "requests_running") + await metric(url, "requests_waiting"):  # noqa: ASYNC110
        await anyio.sleep(0.5)


async def trickle(sockets: list[ClientConnection]) -> None:
    """One more event every ten seconds for each."""
    while sockets:
        for socket in sockets:
            await anyio.sleep(10 / max(1, len(sockets)))
            credit = {"type": "flow.credit", "stream_id": "s", "events": 1}
            await socket.send(json.dumps(credit))
            with anyio.move_on_after(0.001):
                await socket.recv()


async def measure(url: str, stalled: int, slow: int, rounds: int, tokens: int) -> list[Any]:
    """(without, with) p99 between tokens in ms, for each round."""
    results = []
    await normal(url, 50)
    for _ in range(rounds):
        gaps = [gap for s in await normal(url, tokens) for _, gap in s.gaps()]
        alone = percentile(gaps, 99)
        async with AsyncExitStack() as stack:
            sockets = await stall(url, stack, stalled)
            async with anyio.create_task_group() as group:
                group.start_soon(trickle, sockets[:slow])
                gaps = [gap for s in await normal(url, tokens) for _, gap in s.gaps()]
                group.cancel_scope.cancel()
        await quiet(url)
        results.append((alone, percentile(gaps, 99)))
    return results


app = App(name="perf.readers", help=__doc__, help_format="plaintext")


@app.default
def main(*, stalled: int = 500, slow: int = 8, rounds: int = 3, tokens: int = 300) -> None:
    """Measure, and print a table."""
    gc.disable()  # pauses of this process would be taken for the server's
    options = ["--set", "server.slow_consumer_seconds=600", "--set", "server.resume_ttl_seconds=0"]
    with server(*options) as url:
        results = anyio.run(measure, url, stalled, slow, rounds, tokens)
    table = Table("round", "p99 alone, ms", f"p99 beside {stalled}, ms", "ratio")
    for number, (alone, beside) in enumerate(results, start=1):
        table.add_row(str(number), f"{alone:.1f}", f"{beside:.1f}", f"{beside / alone:.2f}")
    ratio = statistics.median(beside / alone for alone, beside in results)
    Console().print(table, f"median ratio {ratio:.2f}")


if __name__ == "__main__":
    app()
