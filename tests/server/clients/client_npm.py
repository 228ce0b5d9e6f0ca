"""Clients of npm: OpenAI's own, and `ws`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.mock import continuation
from tests.server.process import ServerProcess

HERE = Path(__file__).parent
EXPECTED = bytes(continuation(list(b"<user>hi\n<assistant>"), 8)).decode()

if not (HERE / "node_modules" / "openai").exists():
    pytest.skip("npm install --prefix tests/server/clients", allow_module_level=True)


def run(script: str, server: ServerProcess) -> dict[str, Any]:
    done = subprocess.run(
        ["node", script, server.url],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_openais_client(mock: ServerProcess) -> None:
    assert run("openai.mjs", mock) == {
        "chat": EXPECTED,
        "stream": EXPECTED,
        "tokens": 8,
        "plain": bytes(continuation([97, 98], 8)).decode(),
        "response": EXPECTED,
        "responseStream": EXPECTED,
        "error": "NotFoundError model_not_found",
        "socket": EXPECTED,
    }


def test_a_stream_is_cut_and_read_on(mock: ServerProcess) -> None:
    found = run("ws.mjs", mock)
    assert found["text"].startswith(EXPECTED)
    assert found["numbers"] == list(range(len(found["numbers"])))


def test_the_page_of_the_documentation_shows_the_answer_until_it_is_stopped(
    mock: ServerProcess,
) -> None:
    prompt = b"<user>Why is the sky blue?\n<assistant>"
    answer = bytes(continuation(list(prompt), 350)).decode()
    text = run("page.mjs", mock)["text"]
    assert len(text) >= 40
    assert answer.startswith(text)
    assert mock.idle(5)
