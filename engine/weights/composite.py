"""Models that see as well: the part of them that reads and writes text, which is what is served."""

from __future__ import annotations

from typing import Any

# The text part's own `model_type` -> the family that it is.
TEXT_TYPES = {
    "gemma3_text": "gemma3_text",
    "gemma4_text": "gemma4_text",
    "gemma4_unified_text": "gemma4_text",
    "lfm2": "lfm2",
    "mistral": "mistral",
    "ministral3": "ministral3",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_5_text": "qwen3_5_text",
    "qwen3_5_moe_text": "qwen3_5_moe_text",
}
# Whose configuration has the text part's keys beside its own.
FLAT_TYPES = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
# Keys whose null says something else than if they were missing.
MEANT = ("hidden_size_per_layer_input",)
# What a text part's configuration takes from the whole one's.
SHARED = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
# Gemma's files leave out what is the same in most sizes.
GEMMA3 = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA4 = {
    "vocab_size": 262144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
# Gemma 4 without encoders has no vectors of layers, and no word for them.
UNIFIED = GEMMA4 | {
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
}
UNSAID: dict[str, dict[str, Any]] = {
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": UNIFIED,
    # Every model of the kind does.
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}
# Where the text part's tensors are, and where they would be in a model of their own.
PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
    "model.embed_tokens.": "model.embed_tokens.",
    "model.layers.": "model.layers.",
    "model.norm.": "model.norm.",
    "model.embed_tokens_per_layer.": "model.embed_tokens_per_layer.",
    "model.per_layer_": "model.per_layer_",
}


def text_config(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of a composite model's text part; None of any other model."""
    part = raw.get("text_config")
    if not isinstance(part, dict):
        flat = FLAT_TYPES.get(str(raw.get("model_type")))
        return None if flat is None else raw | {"model_type": flat}
    kind = str(part.get("model_type"))
    if kind not in TEXT_TYPES:
        return None
    shared = {key: raw[key] for key in SHARED if raw.get(key) is not None}
    defaults = UNSAID.get(kind, {})
    given = {key: value for key, value in part.items() if value is not None or key in MEANT}
    return defaults | shared | given | {"model_type": TEXT_TYPES[kind]}


def text_name(stored: str) -> str | None:
    """What a composite model's tensor is called in its text part; None of other parts' tensors."""
    for prefix, own in PREFIXES.items():
        if stored.startswith(prefix):
            return own + stored.removeprefix(prefix)
    return None
