"""BERT (Devlin et al., 2018) as sentence encoders use it: texts to vectors, in plain torch.

Reads folders in the layout of `sentence-transformers`: weights, tokenizer, how hidden states are
pooled, and whether vectors are normalized.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from engine.errors import ConfigError
from engine.text.tokenizer import Tokenizer as TextTokenizer

Vectors = npt.NDArray[np.float32]
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class Encoder:
    """One model in fp32. `encode` is not to be called by two threads at once."""

    def __init__(self, folder: Path) -> None:
        config = _read(folder / "config.json")
        if config.get("model_type") != "bert":
            raise ConfigError(
                f"{folder} holds a {config.get('model_type')!r} model; embeddings need one of type "
                "'bert'"
            )
        activation = config["hidden_act"]
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{folder} has the activation {activation!r}, which is not known")
        self._approximate = ACTIVATIONS[activation]
        self._heads: int = config["num_attention_heads"]
        self._layers: int = config["num_hidden_layers"]
        self._epsilon: float = config["layer_norm_eps"]
        self.width: int = config["hidden_size"]
        self.vocab_size: int = config["vocab_size"]
        positions: int = config["max_position_embeddings"]
        said = _read(folder / "sentence_bert_config.json", optional=True).get("max_seq_length")
        self.max_tokens = min(positions, said or positions)
        pooling = _read(folder / "1_Pooling" / "config.json", optional=True)
        self._first_token = bool(pooling.get("pooling_mode_cls_token"))
        if not self._first_token and not pooling.get("pooling_mode_mean_tokens", True):
            raise ConfigError(f"{folder} pools otherwise than by the mean or the first token")
        modules = folder / "modules.json"
        self._normalize = not modules.exists() or "Normalize" in modules.read_text("utf-8")
        try:
            weights = load_file(folder / "model.safetensors")
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"{folder} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Some files have the model's own name in front.
        self._weights = {n.removeprefix("bert."): w.float() for n, w in weights.items()}
        self.bytes = sum(w.nbytes for w in self._weights.values())

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the model's own first and last."""
        return [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]

    def tokenizer(self) -> TextTokenizer:
        """A tokenizer of its own for this vocabulary."""
        return TextTokenizer(Tokenizer.from_str(self._tokenizer.to_str()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    @torch.inference_mode()
    def encode(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        """fp32 `[sequences, width]`, each sequence at most `max_tokens` ids."""
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        present = torch.zeros(len(sequences), longest, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            present[row, : len(sequence)] = True
        x = self._embed(ids)
        for layer in range(self._layers):
            x = self._layer(x, present[:, None, None, :], f"encoder.layer.{layer}.")
        if self._first_token:
            pooled = x[:, 0]
        else:
            mask = present[:, :, None].float()
            pooled = (x * mask).sum(1) / mask.sum(1)
        if self._normalize:
            pooled = functional.normalize(pooled, dim=-1)
        vectors: Vectors = pooled.numpy()
        return vectors

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        w = self._weights
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        return self._norm(x, "embeddings.LayerNorm")

    def _layer(self, x: torch.Tensor, present: torch.Tensor, name: str) -> torch.Tensor:
        rows, length, width = x.shape

        def heads(part: str) -> torch.Tensor:
            projected = self._linear(x, f"{name}attention.self.{part}")
            return projected.view(rows, length, self._heads, -1).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            heads("query"), heads("key"), heads("value"), attn_mask=present
        )
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)
        attended = self._linear(mixed, f"{name}attention.output.dense")
        x = self._norm(x + attended, f"{name}attention.output.LayerNorm")
        inner = self._linear(x, f"{name}intermediate.dense")
        inner = functional.gelu(inner, approximate=self._approximate)
        outer = self._linear(inner, f"{name}output.dense")
        return self._norm(x + outer, f"{name}output.LayerNorm")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(x, (self.width,), weight, bias, self._epsilon)


def _read(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return found
