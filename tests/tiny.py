"""Tiny random models in Hugging Face layout, written without `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
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


# What makes it a Qwen 3.5: delta nets, with two value heads a key head, and one layer of attention.
DELTA: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


# What makes it a Qwen 3 of which one layer sees a window only.
SLIDING: dict[str, Any] = {
    "model_type": "qwen3",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 40,
}


# What makes it an OLMo 3, whose norms stand behind its blocks, and over all heads.
OLMO: dict[str, Any] = {
    "model_type": "olmo3",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 40,
}


# What makes it a Mistral: all layers see a window only.
WINDOWS: dict[str, Any] = {"model_type": "mistral", "sliding_window": 40}


# What makes it an LFM2: short convolutions, and one layer of attention.
CONV: dict[str, Any] = {
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "conv_L_cache": 3,
    "block_auto_adjust_ff_dim": False,
}


# What makes it a DeepSeek: latents in place of keys and values. All layers are dense.
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
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
    olmo = config["model_type"] == "olmo3"
    other_norm = "post_feedforward_layernorm" if olmo else "input_layernorm"
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.{other_norm}.weight": 1 + random(hidden),
            f"{name}.post_attention_layernorm.weight": 1 + random(hidden),
        }
        kind = config.get("layer_types", [""] * 9)[layer]
        if "kv_lora_rank" in config:
            tensors |= latent_tensors(config, f"{name}.self_attn", random)
        elif kind == "linear_attention":
            tensors |= delta_tensors(config, f"{name}.linear_attn", random)
        elif kind == "conv":
            tensors |= {
                f"{name}.conv.in_proj.weight": random(3 * hidden, hidden),
                f"{name}.conv.conv.weight": random(hidden, 1, config["conv_L_cache"]),
                f"{name}.conv.out_proj.weight": random(hidden, hidden),
            }
        else:
            gates = 2 if "linear_num_key_heads" in config else 1
            tensors |= {
                f"{name}.self_attn.q_proj.weight": random(gates * q, hidden),
                f"{name}.self_attn.k_proj.weight": random(kv, hidden),
                f"{name}.self_attn.v_proj.weight": random(kv, hidden),
                f"{name}.self_attn.o_proj.weight": random(hidden, q),
            }
            if kind:
                widths = {"q": q, "k": kv} if olmo else {"q": dim, "k": dim}
                tensors |= {
                    f"{name}.self_attn.{n}_norm.weight": random(w) for n, w in widths.items()
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


def latent_tensors(
    config: dict[str, Any], name: str, random: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those of multi-head latent attention."""
    heads, hidden, rank = (
        config[key] for key in ("num_attention_heads", "hidden_size", "kv_lora_rank")
    )
    plain, turned, value = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return {
        f"{name}.q_proj.weight": random(heads * (plain + turned), hidden),
        f"{name}.kv_a_proj_with_mqa.weight": random(rank + turned, hidden),
        f"{name}.kv_a_layernorm.weight": 1 + random(rank),
        f"{name}.kv_b_proj.weight": random(heads * (plain + value), rank) * (8 / rank) ** 0.5,
        f"{name}.o_proj.weight": random(hidden, heads * value),
    }


def delta_tensors(
    config: dict[str, Any], name: str, random: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those of a gated delta net."""
    heads, hidden = config["linear_num_value_heads"], config["hidden_size"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    return {
        f"{name}.in_proj_qkv.weight": random(2 * keys + values, hidden),
        f"{name}.in_proj_z.weight": random(values, hidden),
        f"{name}.in_proj_b.weight": random(heads, hidden),
        f"{name}.in_proj_a.weight": random(heads, hidden),
        f"{name}.conv1d.weight": random(2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        f"{name}.A_log": random(heads) - 1,
        f"{name}.dt_bias": random(heads),
        f"{name}.norm.weight": 1 + random(config["linear_value_head_dim"]),
        f"{name}.out_proj.weight": random(hidden, values),
    }


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
