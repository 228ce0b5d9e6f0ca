"""What a model's makers recommend, over HTTP: for what a request leaves out, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.process import ServerProcess
from tests.tiny import write_llama

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
WAYS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 24},
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "hi", "max_output_tokens": 24},
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny")
    said = {"temperature": 0.0, "top_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    arguments = ("--model", str(folder), "--dtype", "float32", "--set", "cache.tokens=2048")
    with (
        ServerProcess(*arguments) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        yield client


def said(http: httpx.Client, path: str, **more: Any) -> str:
    """What was answered, without what differs from one answer to the next."""
    response = http.post(path, json={"model": "tiny", **WAYS[path], **more})
    assert response.status_code == 200, response.text
    body = response.json()
    found = body.get("choices") or body.get("content") or body["output"][0]["content"]
    return json.dumps(found)


@pytest.mark.parametrize("path", WAYS)
def test_what_a_request_leaves_out_is_as_recommended(http: httpx.Client, path: str) -> None:
    greedy = said(http, path, temperature=0)
    assert said(http, path) == greedy
    warm = {said(http, path, temperature=2.0, top_p=1.0) for _ in range(4)}
    assert len(warm | {greedy}) > 1


def test_a_response_says_how_it_was_drawn(http: httpx.Client) -> None:
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 4, "top_p": 0.9}
    answer = http.post("/v1/responses", json=body).json()
    assert (answer["temperature"], answer["top_p"]) == (0.0, 0.9)
