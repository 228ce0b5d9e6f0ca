"""The examples of docs/websocket.md, as they are written."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.abc
from anyio.abc import SocketStream

from tests.mock import continuation
from tests.server.process import ROOT, ServerProcess

DOCUMENT = (ROOT / "docs" / "websocket.md").read_text()
QUESTION = "Why is the sky blue?"
ANSWER = bytes(continuation(list(f"<user>{QUESTION}\n<assistant>".encode()), 300)).decode()


def example(language: str, server: ServerProcess) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    assert "127.0.0.1:8000" in found[1]
    return found[1].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_the_python_example_prints_the_answer(mock: ServerProcess, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example("python", mock))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(ANSWER)


async def test_the_python_example_goes_on_after_a_drop(mock: ServerProcess, tmp_path: Path) -> None:
    """Through a proxy that cuts the first connections after a while."""
    cuts = [1500, 4000, 9000]
    connections = 0

    async def copy(source: SocketStream, target: SocketStream, limit: float) -> None:
        copied = 0
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while copied < limit:
                data = await source.receive()
                copied += len(data)
                await target.send(data)
        await anyio.aclose_forcefully(target)
        await anyio.aclose_forcefully(source)

    async def serve(client: SocketStream) -> None:
        nonlocal connections
        connections += 1
        server = await anyio.connect_tcp("127.0.0.1", mock.port)
        limit = cuts.pop(0) if cuts else math.inf
        async with anyio.create_task_group() as group:
            group.start_soon(copy, client, server, math.inf)
            group.start_soon(copy, server, client, limit)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    script = tmp_path / "example.py"
    script.write_text(example("python", mock).replace(str(mock.port), str(port)))
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        with anyio.fail_after(60):
            done = await anyio.run_process([sys.executable, str(script)], stderr=None)
        group.cancel_scope.cancel()
    assert connections >= 3
    assert done.stdout.decode().startswith(ANSWER)
