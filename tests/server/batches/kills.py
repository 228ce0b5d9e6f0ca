"""Kills a server at random moments of a batch, and sees that the next one completes it.

python -m tests.server.batches.kills --times 50
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from cyclopts import App

from tests.mock import continuation
from tests.server.conftest import batch_process

app = App(help=__doc__)
LINES, TOKENS = 60, 12


def wanted() -> dict[str, str]:
    """The text of every line's answer."""
    prompts = {f"line-{n}": f"prompt {n}" for n in range(LINES)}
    return {k: bytes(continuation(list(p.encode()), TOKENS)).decode() for k, p in prompts.items()}


def input_lines() -> bytes:
    lines = []
    for number in range(LINES):
        body = {"model": "mock", "prompt": f"prompt {number}", "max_tokens": TOKENS}
        line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps(line | {"body": body}))
    return "\n".join(lines).encode()


def submit(url: str) -> str:
    form = {"purpose": "batch"}
    file = httpx.post(f"{url}/v1/files", data=form, files={"file": ("in.jsonl", input_lines())})
    body = {
        "input_file_id": file.json()["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    batch: str = httpx.post(f"{url}/v1/batches", json=body).json()["id"]
    return batch


def await_end(url: str, batch: str) -> dict[str, Any]:
    for _ in range(600):
        found: dict[str, Any] = httpx.get(f"{url}/v1/batches/{batch}").json()
        if found["status"] == "completed":
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def check(url: str, batch: dict[str, Any]) -> None:
    """Every line once, with the text that it has to have."""
    assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    content = httpx.get(f"{url}/v1/files/{batch['output_file_id']}/content").content
    lines = [json.loads(line) for line in content.splitlines()]
    assert len(lines) == LINES
    texts = {ln["custom_id"]: ln["response"]["body"]["choices"][0]["text"] for ln in lines}
    assert texts == wanted()


def kill_once(folder: Path, chance: random.Random) -> int:
    """Returns how many lines had been answered when the server was killed."""
    first, second = folder / "first", folder / "second"
    with batch_process(first, delay=0.003) as server:
        batch = submit(server.url)
        time.sleep(chance.random() * 0.9)
        counts = httpx.get(f"{server.url}/v1/batches/{batch}").json()["request_counts"]
        done: int = counts["completed"]
        server.kill()
    # As it lies there, in the middle of whatever it was in.
    shutil.copytree(first, second)
    with batch_process(second, delay=0.0) as server:
        check(server.url, await_end(server.url, batch))
    return done


@app.default
def main(*, times: int = 50, seed: int = 0) -> None:
    """Kill so many times, and print how far the batches had come."""
    chance, found = random.Random(seed), []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            found.append(kill_once(Path(folder), chance))
    print(f"{times} of {times} batches were completed, every line once")
    print(f"lines that had been answered before: {sorted(found)} of {LINES}")


if __name__ == "__main__":
    main()
