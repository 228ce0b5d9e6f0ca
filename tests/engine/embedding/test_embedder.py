"""An encoder's vectors against transformers' own, and how requests share it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from engine.config import EmbeddingSection
from engine.embedding.embedder import BATCH_TOKENS, Embedder
from engine.embedding.encoder import Encoder, Vectors
from engine.errors import ConfigError, EngineFailed, InvalidRequest, Overloaded

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]


def write_bert(folder: Path, **pooling: bool) -> BertModel:
    """A tiny random model in the layout of sentence encoders."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=40,
    )  # fmt: skip
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 30}')
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    write_bert(folder)
    return folder


@pytest.fixture
def embedder(folder: Path) -> Iterator[Embedder]:
    embedder = Embedder(EmbeddingSection(model=str(folder), max_waiting_tokens=100))
    embedder.load()
    yield embedder
    embedder.close()


@pytest.mark.parametrize("first_token", [False, True], ids=["mean", "first token"])
def test_vectors_are_those_of_the_original(tmp_path: Path, first_token: bool) -> None:
    model = write_bert(tmp_path / "m", pooling_mode_cls_token=first_token)
    encoder = Encoder(tmp_path / "m")
    ids = encoder.tokenize(["a b c", "d", "e f g h i j"])
    found = encoder.encode(ids)
    for sequence, vector in zip(ids, found, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([sequence])).last_hidden_state[0]
        wanted = hidden[0] if first_token else hidden.mean(0)
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
        assert np.allclose(vector, wanted.numpy(), atol=1e-5)


def test_company_changes_nothing_that_matters(embedder: Embedder) -> None:
    ids = embedder.encoder.tokenize(["a b c", "d e f g h i j k l", "m"])
    together = embedder.submit(ids, "t").result(10)
    for sequence, vector in zip(ids, together, strict=True):
        alone = embedder.submit([sequence], "t").result(10)[0]
        assert np.allclose(alone, vector, atol=1e-6)


def test_wrong_inputs_are_refused(embedder: Embedder) -> None:
    for bad in ([[]], [[1, 99]], [[-1]]):
        with pytest.raises(InvalidRequest, match="empty, or has a token outside"):
            embedder.submit(bad, "t")
    with pytest.raises(InvalidRequest, match="at most 30") as long:
        embedder.submit([[1] * 31], "t")
    assert long.value.code == "context_length_exceeded"


class Held:
    """Holds up the encoder, so that requests queue, and notes what it is given."""

    def __init__(self, embedder: Embedder) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.batches: list[list[int]] = []
        self._encode = embedder.encoder.encode
        embedder.encoder.encode = self.encode  # type: ignore[method-assign]

    def encode(self, sequences: list[list[int]]) -> Vectors:
        self.begun.set()
        self.go.wait(10)
        self.batches.append([len(s) for s in sequences])
        return self._encode(sequences)


def test_too_much_that_waits_is_refused(embedder: Embedder) -> None:
    held = Held(embedder)
    first = embedder.submit([[1, 2]], "t")
    held.begun.wait(10)
    waiting = [embedder.submit([[1, 4, 2] * 10], "t") for _ in range(3)]
    with pytest.raises(Overloaded, match="90 tokens wait"):
        embedder.submit([[1, 4, 2] * 4], "t")
    held.go.set()
    assert all(len(f.result(10)) == 1 for f in [first, *waiting])
    embedder.submit([[1, 4, 2] * 10], "t").result(10)


def test_tenants_take_turns_batch_by_batch(embedder: Embedder) -> None:
    rows = BATCH_TOKENS // 20
    embedder._section = EmbeddingSection(model="x")
    held = Held(embedder)
    large = embedder.submit([[4] * 20] * (3 * rows), "large")
    held.begun.wait(10)
    small = embedder.submit([[5] * 7], "small")
    held.go.set()
    small.result(10)
    large.result(20)
    assert held.batches == [[20] * rows, [20] * rows, [7], [20] * rows]


def test_what_can_come_later_comes_after_all_others(embedder: Embedder) -> None:
    rows = BATCH_TOKENS // 20
    embedder._section = EmbeddingSection(model="x", max_waiting_tokens=3 * rows * 20)
    held = Held(embedder)
    large = embedder.submit([[4] * 20] * (3 * rows), "a", later=True)
    held.begun.wait(10)
    small = embedder.submit([[5] * 7], "b", later=True)
    asked = [embedder.submit([[6] * size] * rows, "a") for size in (20, 19)]
    held.go.set()
    for future in (*asked, small, large):
        future.result(20)
    sizes = [batch[0] for batch in held.batches]
    assert sizes == [20, 20, 19, 20, 7, 20]
    assert embedder._waiting == {False: 0, True: 0}


def test_what_nobody_waits_for_is_not_encoded(embedder: Embedder) -> None:
    held = Held(embedder)
    first = embedder.submit([[1, 2]], "t")
    held.begun.wait(10)
    gone = embedder.submit([[1, 4, 2] * 10], "t")
    gone.cancel()
    last = embedder.submit([[1, 5, 2]], "t")
    held.go.set()
    assert len(last.result(10)) == 1
    assert len(first.result(10)) == 1
    assert held.batches == [[2], [3]]
    assert embedder._waiting == {False: 0, True: 0}


def test_a_thousand_that_leave_cost_nobody_else(folder: Path) -> None:
    embedder = Embedder(EmbeddingSection(model=str(folder)))
    embedder.load()
    held = Held(embedder)
    first = embedder.submit([[1, 2]], "t")
    held.begun.wait(10)
    for _ in range(2000):
        embedder.submit([[1, 2]], "t").cancel()
    last = embedder.submit([[1, 2]], "t")
    held.go.set()
    assert len(first.result(10)) == len(last.result(10)) == 1
    embedder.close()


def test_a_failure_ends_one_request_alone(embedder: Embedder) -> None:
    encode = embedder.encoder.encode

    def fail(sequences: list[list[int]]) -> Vectors:
        embedder.encoder.encode = encode  # type: ignore[method-assign]
        raise RuntimeError("broken")

    embedder.encoder.encode = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(EngineFailed, match="RuntimeError"):
        embedder.submit([[1, 2]], "t").result(10)
    assert len(embedder.submit([[1, 2]], "t").result(10)) == 1
    assert embedder._waiting == {False: 0, True: 0}


def test_closing_refuses_what_waits(folder: Path) -> None:
    embedder = Embedder(EmbeddingSection(model=str(folder)))
    embedder.load()
    held = Held(embedder)
    embedder.submit([[1, 2]], "t")
    held.begun.wait(10)
    waiting = embedder.submit([[1, 2]], "t")
    closing = threading.Thread(target=embedder.close)
    closing.start()
    with pytest.raises(EngineFailed, match="shut down"):
        waiting.result(10)
    held.go.set()
    closing.join(10)
    with pytest.raises(EngineFailed, match="shutting down"):
        embedder.submit([[1, 2]], "t")


def test_other_models_are_refused_in_one_sentence(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="one of type 'bert'"):
        Encoder(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Encoder(tmp_path / "nowhere")
    write_bert(tmp_path / "max", pooling_mode_mean_tokens=False)
    with pytest.raises(ConfigError, match="pools otherwise"):
        Encoder(tmp_path / "max")
