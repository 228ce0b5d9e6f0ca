"""A server whose only model embeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import AsyncEngine, Config, ConfigError, InvalidRequest
from engine.config import EmbeddingSection, ModelSection
from engine.embedding.alone import load_both
from engine.embedding.embedder import Embedder
from tests.server.process import ServerProcess

MODEL = "all-minilm-l6-v2"
ALONE = ("--model", "none", "--embedding-model", MODEL)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(*ALONE) as server:
        yield server


def test_it_is_ready_and_lists_its_model(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, 256)
    assert server.metric("ryzanstein_requests_waiting") == 0


def test_it_embeds_and_counts_tokens(server: ServerProcess) -> None:
    body: dict[str, Any] = {"model": MODEL, "input": ["a", "b c"]}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [384, 384]
    counted = httpx.post(f"{server.url}/tokenize", json={"prompt": "b c"}).json()
    assert counted["count"] == answer["usage"]["prompt_tokens"] - 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("completions", {"prompt": "hi"}),
        ("responses", {"input": "hi"}),
        ("messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
@pytest.mark.parametrize("model", [MODEL, "other"])
def test_what_asks_for_text_is_told_that_there_is_none(
    server: ServerProcess, path: str, body: dict[str, Any], model: str
) -> None:
    response = httpx.post(f"{server.url}/v1/{path}", json={"model": model, **body})
    assert response.status_code == 404
    assert "nothing here generates text" in response.json()["error"]["message"]


async def test_the_engine_refuses_prompts_by_itself() -> None:
    embedder = Embedder(EmbeddingSection(model=MODEL))
    config = Config(model=ModelSection(name="none"))
    async with AsyncEngine(lambda: load_both(config, embedder)) as engine:
        with pytest.raises(InvalidRequest, match="only embeds"):
            await engine.submit("hi")
        assert engine.health() == "ok"
    embedder.close()


def test_there_has_to_be_some_model() -> None:
    with pytest.raises(ConfigError, match="--embedding-model"):
        load_both(Config(model=ModelSection(name="none")), None)


def test_a_batch_of_embeddings_needs_no_other_model(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": MODEL, "input": "a"}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": body}
    source.write_text(json.dumps(line))
    command = [sys.executable, "-m", "server.cli", "run-batch", str(source), str(target), *ALONE]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (answer,) = target.read_text().splitlines()
    assert len(json.loads(answer)["response"]["body"]["data"][0]["embedding"]) == 384
