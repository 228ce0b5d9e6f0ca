"""How GGUF files hold DeepSeek's models, and others with latent attention: names and widths."""

from __future__ import annotations

from typing import Any

from engine.errors import ConfigError

ARCHITECTURE = "deepseek2"
# By whether experts' probabilities are each score's own.
MODEL_TYPES = {False: "deepseek_v2", True: "deepseek_v3"}
NAMES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
# Tensors `[heads, rows, columns]` that are taken as matrices.
OF_HEADS = ("attn_k_b", "attn_v_b")
SOFTMAX, SIGMOID = 1, 2
# Files of GLM-4.7-Flash that do not say how experts are chosen are known by these.
GLM_LAYERS, GLM_VOCABULARY = (47, 48), 154880


def read_keys(metadata: dict[str, Any], vocabulary: int, file: str) -> dict[str, Any]:
    """What the metadata of such a file say otherwise than others do, in Hugging Face's keys. Raises
    ConfigError if a key is missing or none of its kind."""

    def said(*keys: str) -> int:
        values = (metadata.get(f"{ARCHITECTURE}.{key}") for key in keys)
        value = next((value for value in values if value is not None), None)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{file}: key '{ARCHITECTURE}.{keys[-1]}' is {value!r}")
        return value

    # Files from before attention to latents lack those that end in `mla`.
    key = said("attention.key_length_mla", "attention.key_length")
    turned = said("rope.dimension_count")
    if turned >= key:
        raise ConfigError(f"{file}: rope.dimension_count is {turned}, of heads of {key}")
    glm = metadata.get(f"{ARCHITECTURE}.block_count") in GLM_LAYERS
    unsaid = SIGMOID if glm and vocabulary == GLM_VOCABULARY else SOFTMAX
    kind = metadata.get(f"{ARCHITECTURE}.expert_gating_func") or unsaid
    if kind not in (SOFTMAX, SIGMOID):
        raise ConfigError(f"{file}: expert_gating_func is {kind}, not {SOFTMAX} or {SIGMOID}")
    config = {
        "model_type": MODEL_TYPES[kind == SIGMOID],
        "kv_lora_rank": said("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": said("attention.value_length_mla", "attention.value_length"),
        "norm_topk_prob": bool(metadata.get(f"{ARCHITECTURE}.expert_weights_norm")),
    }
    if f"{ARCHITECTURE}.attention.q_lora_rank" in metadata:
        config["q_lora_rank"] = said("attention.q_lora_rank")
    groups = {"n_group": "expert_group_count", "topk_group": "expert_group_used_count"}
    for ours, theirs in groups.items():
        if f"{ARCHITECTURE}.{theirs}" in metadata:
            config[ours] = said(theirs)
    return config
