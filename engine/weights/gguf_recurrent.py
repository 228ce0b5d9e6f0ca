"""How GGUF files hold Qwen3-Next, Qwen 3.5 and LFM2: names and sizes of layers that keep states.

llama.cpp's converter writes value heads of Qwen 3.5 so that they take turns with the key heads.
"""

from __future__ import annotations

from typing import Any

from engine.errors import ConfigError

MODEL_TYPES = {
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}
CONV_TYPES = {"lfm2": "lfm2", "lfm2moe": "lfm2_moe"}
CONV_NAMES = {f"shortconv.{part}": f"conv.{part}" for part in ("in_proj", "conv", "out_proj")}
# Of a shared expert with a gate, as Qwen's mixtures have one.
SHARED_NAMES = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",  # both, in older files of Qwen3-Next
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    **SHARED_NAMES,
}
# Tensors behind a layer's number that are neither a weight nor, in Hugging Face's names, a bias.
WHOLE_NAMES = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}


def read_conv_keys(metadata: dict[str, Any], file: str) -> dict[str, Any]:
    """The same of LFM2's files: layers without key and value heads are convolutions."""
    architecture = metadata["general.architecture"]
    heads = metadata.get(f"{architecture}.attention.head_count_kv")
    if not isinstance(heads, list) or not any(heads):
        raise ConfigError(f"{file}: attention.head_count_kv is {heads!r}, not one for each layer")
    return {
        "conv_L_cache": metadata.get(f"{architecture}.shortconv.l_cache"),
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,  # done already
    }


def read_keys(metadata: dict[str, Any], file: str) -> dict[str, Any]:
    """What the metadata of such a file say beside what all files do, in Hugging Face's keys. Raises
    ConfigError if heads have no whole width."""
    architecture = metadata["general.architecture"]
    config = {
        name: metadata[f"{architecture}.{key}"]
        for key, name in KEYS.items()
        if metadata.get(f"{architecture}.{key}")
    }
    heads = config.get("linear_num_value_heads")
    wide = metadata.get(f"{architecture}.ssm.inner_size")
    if not (isinstance(heads, int) and isinstance(wide, int) and heads > 0 and wide % heads == 0):
        raise ConfigError(f"{file}: ssm.inner_size {wide!r} is not shared out to {heads!r} heads")
    config["linear_value_head_dim"] = wide // heads
    config["linear_tiled_value_heads"] = architecture != "qwen3next"
    recurrent = metadata.get(f"{architecture}.attention.recurrent_layers")
    if isinstance(recurrent, list):
        # Of blocks that guess ahead as well, which are no layers.
        layers = len(recurrent) - (metadata.get(f"{architecture}.nextn_predict_layers") or 0)
        kinds = ("full_attention", "linear_attention")
        config["layer_types"] = [kinds[bool(keeps_state)] for keeps_state in recurrent[:layers]]
    return config
