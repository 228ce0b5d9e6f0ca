"""The vectors of `/v1/embeddings` are those of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from engine.weights.sources import resolve
from tests.server.process import ServerProcess
from tests.tiny import write_llama

transformers = pytest.importorskip("sentence_transformers", reason="pip install -e '.[clients]'")

MODEL = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = write_llama(tmp_path_factory.mktemp("models") / "tiny")
    with ServerProcess("--model", str(folder), "--embedding-model", MODEL) as server:
        yield server


def test_they_are_equal(server: ServerProcess) -> None:
    texts = [("word " * n + f"number {n}").strip() for n in (*range(20), 60, 120, 200)]
    texts += ["größere Straßen", "日本語のテキスト", "emoji 🙂 here", "A man is eating food."]
    wanted = transformers.SentenceTransformer(str(resolve(MODEL)), device="cpu").encode(texts)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=MODEL, input=texts)
    found = np.array([item.embedding for item in answer.data])
    assert np.abs(found - wanted).max() < 1e-3
