"""Tensors that a family's files call otherwise than most."""

from __future__ import annotations

from collections.abc import Mapping

# Parts of names, and what stands for them here; by `model_type`.
LFM2 = {
    "model.embedding_norm.": "model.norm.",
    ".operator_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".self_attn.out_proj.": ".self_attn.o_proj.",
    ".self_attn.q_layernorm.": ".self_attn.q_norm.",
    ".self_attn.k_layernorm.": ".self_attn.k_norm.",
    ".feed_forward.expert_bias": ".mlp.gate.e_score_correction_bias",
    ".feed_forward.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}
GEMMA4 = {
    ".router.proj.": ".mlp.gate.",
    ".router.": ".mlp.gate.",
    ".experts.": ".mlp.experts.",
    ".mlp.mlp.": ".mlp.",  # of names that were usual ones
}
NAMES: Mapping[str, Mapping[str, str]] = {
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "gemma4_text": GEMMA4,
}


def usual_name(model_type: object, stored: str) -> str:
    """What a tensor is called here; most are as they are stored."""
    for part, usual in NAMES.get(str(model_type), {}).items():
        stored = stored.replace(part, usual)
    return stored
