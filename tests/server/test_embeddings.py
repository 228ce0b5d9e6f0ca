"""`/v1/embeddings` with a real model, through OpenAI's client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from engine.weights.sources import resolve
from tests.server.process import ServerProcess
from tests.tiny import write_llama

MODEL = "all-minilm-l6-v2"
TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell by two percent on Tuesday.",
    "größere Straßen",
    "x",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny")
    arguments = ("--model", str(folder), "--set", "cache.tokens=4096", "--embedding-model", MODEL)
    with ServerProcess(*arguments) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def original(texts: list[str]) -> Any:
    """What the model's authors' recipe gives: the mean of the last hidden states, normalized."""
    folder = resolve(MODEL)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None].float()
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1).numpy()


def test_vectors_equal_the_originals(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)  # the client asks for base64
    found = np.array([item.embedding for item in answer.data])
    assert found.shape == (5, 384)
    assert np.abs(found - original(TEXTS)).max() < 1e-3
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    assert [item.index for item in answer.data] == list(range(5))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 20


def test_both_encodings_hold_the_same(server: ServerProcess) -> None:
    def ask(form: str) -> Any:
        body = {"model": MODEL, "input": "x", "encoding_format": form}
        return httpx.post(f"{server.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]

    floats = np.array(ask("float"), np.float32)
    packed = np.frombuffer(base64.b64decode(ask("base64")), "<f4")
    assert np.array_equal(floats, packed)


def test_fewer_dimensions_are_the_first_ones_of_length_one(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model=MODEL, input="x").data[0].embedding)
    short = client.embeddings.create(model=MODEL, input="x", dimensions=64).data[0].embedding
    assert len(short) == 64
    assert np.linalg.norm(short) == pytest.approx(1, abs=1e-5)
    assert np.allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-5)


def test_token_ids_embed_as_their_text(client: openai.OpenAI) -> None:
    ids = AutoTokenizer.from_pretrained(resolve(MODEL))(TEXTS[0])["input_ids"]
    by_text = client.embeddings.create(model=MODEL, input=TEXTS[0]).data[0].embedding
    for given in (ids, [ids]):
        assert client.embeddings.create(model=MODEL, input=given).data[0].embedding == by_text


def test_long_texts_are_refused_unless_they_are_to_be_cut(client: openai.OpenAI) -> None:
    text = "word " * 400
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model=MODEL, input=text)
    assert (long.value.param, long.value.code) == ("input", "context_length_exceeded")
    cut = client.embeddings.create(
        model=MODEL, input=text, extra_body={"truncate_prompt_tokens": -1}
    )
    assert cut.usage.prompt_tokens == 256
    assert np.abs(np.array(cut.data[0].embedding) - original([text])[0]).max() < 1e-3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [""]}, None),
        ({"input": [1, "a"]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [40_000]}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 385}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"model": "other"}, "model"),
        ({"model": None}, "model"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": MODEL, "input": "x", **fields})
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/embeddings", content=body, headers=headers)
    if param is None:
        assert response.status_code == 200  # an empty text has its first and last token
        return
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["param"] == param


def test_it_is_listed_beside_the_chat_model(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_server_without_one_says_how_to_have_one(mock: ServerProcess) -> None:
    response = httpx.post(f"{mock.url}/v1/embeddings", json={"model": "x", "input": "y"})
    assert response.status_code == 404
    assert "--embedding-model" in response.json()["error"]["message"]
