"""How GGUF files hold Gemma 4: names, and sizes that differ between layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from engine.errors import ConfigError

ARCHITECTURE, MODEL_TYPE = "gemma4", "gemma4_text"
TOP_NAMES = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
# Gemma 3's norms, and what came with Gemma 4.
NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NAMES = {
    **NORMS,
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
# Tensors behind a layer's number that Hugging Face does not call a weight.
WHOLE_NAMES = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "mlp.gate.scale",
    "ffn_down_exps.scale": "mlp.gate.per_expert_scale",
}


def read_keys(metadata: dict[str, Any], tensors: Collection[str], file: str) -> dict[str, Any]:
    """What the metadata of such a file say otherwise than others do, in Hugging Face's keys. Raises
    ConfigError if a key is missing or none of its kind."""

    def said(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise ConfigError(f"{file} has no key '{ARCHITECTURE}.{key}'")
        return value

    layers, sliding = said("block_count"), said("attention.sliding_window_pattern")
    if not (isinstance(sliding, list) and len(sliding) == layers and not all(sliding)):
        raise ConfigError(f"{file}: attention.sliding_window_pattern is no list of its layers")
    heads = _each(said("attention.head_count_kv"), layers, "attention.head_count_kv", file)
    widths = _each(said("feed_forward_length"), layers, "feed_forward_length", file)
    full = sliding.index(False)
    near = sliding.index(True) if any(sliding) else full
    keys_alone = f"blk.{full}.attn_v.weight" not in tensors
    config = {
        "layer_types": [("full", "sliding")[bool(s)] + "_attention" for s in sliding],
        "num_key_value_heads": heads[near],
        "num_global_key_value_heads": heads[full],
        "attention_k_eq_v": keys_alone,
        "head_dim": said("attention.key_length_swa"),
        "global_head_dim": said("attention.key_length"),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "num_kv_shared_layers": said("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": said("embedding_length_per_layer_input", 0),
        "final_logit_softcapping": metadata.get(f"{ARCHITECTURE}.final_logit_softcapping"),
        "enable_moe_block": bool(metadata.get(f"{ARCHITECTURE}.expert_count")),
        "rope_parameters": {
            "full_attention": {"rope_theta": said("rope.freq_base")},
            "sliding_attention": {"rope_theta": said("rope.freq_base_swa", 1e4)},
        },
    }
    if not keys_alone and heads[near] != heads[full]:
        raise ConfigError(f"{file}: attention.head_count_kv is {heads}, with values of their own")
    return config


def _each(value: Any, layers: Any, key: str, file: str) -> list[int]:
    """A number for each layer, or one for all."""
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers or not all(type(v) is int and v > 0 for v in values):
        raise ConfigError(f"{file}: {key} is {value!r}, not a count for each of {layers!r} layers")
    return values
