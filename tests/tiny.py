"""Tiny random models in Hugging Face layout, written without `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.mock import CHAT, byte_backend

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "vocab_size": 260,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}


# What makes it a Mixtral.
EXPERTS: dict[str, Any] = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a Llama-family model, large enough to make varied text."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    hidden, wide, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    tensors = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden),
        "model.norm.weight": 1 + random(hidden),
        "lm_head.weight": random(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": 1 + random(hidden),
            f"{name}.post_attention_layernorm.weight": 1 + random(hidden),
            f"{name}.self_attn.q_proj.weight": random(q, hidden),
            f"{name}.self_attn.k_proj.weight": random(kv, hidden),
            f"{name}.self_attn.v_proj.weight": random(kv, hidden),
            f"{name}.self_attn.o_proj.weight": random(hidden, q),
        }
        blocks = {f"{name}.mlp": ("gate_proj", "up_proj", "down_proj")}
        if count := config.get("num_local_experts"):
            block = f"{name}.block_sparse_moe"
            tensors[f"{block}.gate.weight"] = random(count, hidden)
            blocks = {f"{block}.experts.{n}": ("w1", "w3", "w2") for n in range(count)}
        for block, (gate, up, down) in blocks.items():
            tensors |= {
                f"{block}.{gate}.weight": random(wide, hidden),
                f"{block}.{up}.weight": random(wide, hidden),
                f"{block}.{down}.weight": random(hidden, wide),
            }
    return tensors


def write_tokenizer(folder: Path, chat_template: str | None = CHAT) -> None:
    byte_backend().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llama(folder: Path, chat_template: str | None = CHAT, **changes: Any) -> Path:
    """A complete model folder; `changes` override configuration keys."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors(config), folder / "model.safetensors")
    write_tokenizer(folder, chat_template)
    return folder
