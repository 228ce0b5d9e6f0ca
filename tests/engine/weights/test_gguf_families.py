"""GGUF files of families whose tensors or scales are not Llama's, as llama.cpp's converter writes
them: the logits are those of the folder that they were made from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.models import load_model
from engine.models.config import ModelConfig, read_config
from engine.weights import gguf_latent
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import tiny
from tests.engine.weights.test_gguf import (
    GGUF_NAMES,
    gguf_name,
    interleave,
    write_out,
    writer_of,
)
from tests.kernels.native import needs_native
from tests.ranks import logits_of, program_of

FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
OWN_NORMS = {
    "glm4": {
        "post_self_attn_layernorm": "post_attention_norm",
        "post_mlp_layernorm": "post_ffw_norm",
    },
    "olmo2": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
    "gpt-oss": {
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.sinks": "attn_sinks",
        "mlp.router": "ffn_gate_inp",
    },
    "glm4moe": {
        "post_attention_layernorm": "post_attention_norm",
        "mlp.gate.e_score_correction_bias": "exp_probs_b",
    },
    "ernie4_5-moe": {"mlp.moe_statics.e_score_correction_bias": "exp_probs_b"},
    "deepseek2": {
        "mlp.gate.e_score_correction_bias": "exp_probs_b",
        **{ours: theirs for theirs, ours in gguf_latent.NAMES.items()},
    },
}
BARE = {"sinks": ".weight", "e_score_correction_bias": ".bias"}
SHARED = {f"mlp.shared_experts.{p}_proj": f"ffn_{p}_shexp" for p in ("gate", "up", "down")}
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
TOKENS = list(range(3, 63))


def write_yarn(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "llama_4_scaling_beta" in rope:
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])


def write_olmo3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    write_yarn(writer, {"rope_parameters": config["rope_parameters"]["full_attention"]})
    writer.add_sliding_window_pattern([t == "sliding_attention" for t in config["layer_types"]])


def write_longrope(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    original = rope["original_max_position_embeddings"]
    factor = config["max_position_embeddings"] / original
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * 16))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
    for name in ("long", "short"):
        factors = np.array(rope[f"{name}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", factors)


def write_scales(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def write_half(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"] // 2)


def write_gpt_oss(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    write_yarn(writer, config)
    writer.add_key_length(config["head_dim"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def write_nothing(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The file says nothing of which layers rotate."""


def write_experts(writer: gguf.GGUFWriter, config: dict[str, Any], names: tuple[str, str]) -> None:
    writer.add_key_length(config["head_dim"])
    writer.add_expert_count(config[names[0]])
    writer.add_expert_used_count(config[names[1]])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def write_glm_experts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    write_experts(writer, config, ("n_routed_experts", "num_experts_per_tok"))
    writer.add_rope_dimension_count(config["head_dim"] // 2)
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_nextn_predict_layers(1)
    # What guesses further ahead; it is passed over.
    writer.add_tensor("blk.4.nextn.eh_proj.weight", np.ones((4, 4), np.float32))
    writer.add_tensor("blk.4.attn_norm.weight", np.ones(64, np.float32))


def write_latents(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Before files were made for attention to latents, their widths were those of heads."""
    write_experts(writer, config, ("n_routed_experts", "num_experts_per_tok"))
    key, rank = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_kv_lora_rank(rank)
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config["q_lora_rank"] is None:
        writer.add_key_length(key)
        writer.add_value_length(config["v_head_dim"])
        return
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_key_length(rank + config["qk_rope_head_dim"])
    writer.add_value_length(rank)
    writer.add_key_length_mla(key)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if "mscale_all_dim" in config["rope_parameters"]:
        write_yarn(writer, config)
        writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_parameters"]["mscale_all_dim"])


def apart(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The projections of latents as two tensors, that of keys turned about, where queries are made
    by way of a few values, too."""
    if "kv_b_proj" not in name or config["q_lora_rank"] is None:
        return {name: tensor}
    heads, plain = config["num_attention_heads"], config["qk_nope_head_dim"]
    keys, values = tensor.view(heads, -1, tensor.shape[1]).split([plain, config["v_head_dim"]], 1)
    both = {"k_b_proj": keys.transpose(1, 2), "v_b_proj": values}
    return {name.replace("kv_b_proj", part): value for part, value in both.items()}


def write_ernie_experts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    write_experts(writer, config, ("moe_num_experts", "moe_k"))
    writer.add_expert_shared_count(config["moe_num_shared_experts"])
    writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    writer.add_expert_weights_scale(0.0)  # which says nothing


def stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each layer's experts in one tensor for each projection, under a name for GGUF's table."""
    found: dict[str, list[torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else 0 for p in n.split(".")]):
        if match := re.fullmatch(r"(.*\.mlp\.experts)\.\d+\.(\w+)_proj\.weight", name):
            found.setdefault(f"{match[1]}_{match[2]}.weight", []).append(tensors[name])
        else:
            rest[name] = tensors[name]
    return rest | {name: torch.stack(parts) for name, parts in found.items()}


STACKS = {f"mlp.experts_{p}": f"ffn_{p}_exps" for p in ("gate", "up", "down")}


def write_stack(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Of all experts one tensor for each projection."""
    layer, kind = name.split(".")[2], name.rpartition(".")[2]
    suffix = "bias" if kind.endswith("_bias") else "weight"
    outputs = tensor if suffix == "bias" else tensor.transpose(1, 2)
    parts = {"down": outputs}
    if kind.startswith("gate_up"):
        parts = {"gate": outputs[:, ::2], "up": outputs[:, 1::2]}
    for part, values in parts.items():
        array = np.ascontiguousarray(values.numpy())
        writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.{suffix}", array)


OWN_KEYS = {
    "qwen2-yarn": ("qwen2", write_yarn),
    "ministral3": ("mistral3", write_yarn),
    "phi3": ("phi3", write_nothing),
    "phi3-longrope": ("phi3", write_longrope),
    "smollm3": ("smollm3", write_nothing),
    "granite": ("granite", write_scales),
    "glm4": ("glm4", write_half),
    "olmo2": ("olmo2", write_nothing),
    "olmo3": ("olmo2", write_nothing),
    "olmo3-yarn": ("olmo2", write_olmo3),
    "ernie4_5": ("ernie4_5", write_nothing),
    "seed_oss": ("seed_oss", write_nothing),
    "gpt_oss": ("gpt-oss", write_gpt_oss),
    "glm4_moe": ("glm4moe", write_glm_experts),
    "ernie4_5_moe": ("ernie4_5-moe", write_ernie_experts),
    "deepseek_v2": ("deepseek2", write_latents),
    "deepseek_v3": ("deepseek2", write_latents),
    "deepseek_v3-groups": ("deepseek2", write_latents),
}


@pytest.mark.parametrize("family", OWN_KEYS)
def test_a_family_gives_the_logits_of_its_folder(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, write_keys = OWN_KEYS[family]
    # Files of these have no width of heads.
    folder = tiny(tmp_path / "folder", family, hidden_size=64)
    config = json.loads((folder / "config.json").read_text())
    file = tmp_path / "model.gguf"
    # One block more for what guesses further ahead.
    blocks = config["num_hidden_layers"] + (architecture == "glm4moe")
    writer = writer_of(file, architecture, config | {"num_hidden_layers": blocks})
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    write_keys(writer, config)
    monkeypatch.setattr(
        "tests.engine.weights.test_gguf.GGUF_NAMES",
        GGUF_NAMES | FUSED | STACKS | SHARED | OWN_NORMS.get(architecture, {}),
    )
    for name, tensor in stacked_experts(load_file(folder / "model.safetensors")).items():
        if ".experts." in name:
            write_stack(writer, name, tensor)
            continue
        if architecture == "deepseek2":
            for part, values in apart(name, tensor, config).items():
                own = part + BARE.get(part.rpartition(".")[2], "")
                writer.add_tensor(gguf_name(own), np.ascontiguousarray(values.numpy()))
            continue
        name += BARE.get(name.rpartition(".")[2], "")
        array = tensor.numpy()
        for part, heads in HEADS.items():
            if part in name and architecture in ("mistral3", "smollm3", "granite"):
                array = interleave(array, config[heads])
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    write_out(writer)
    results = [run(path, "torch", [len(TOKENS)], TOKENS) for path in (file, folder)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert float(results[0].std()) > 0.03


def read(folder: Path, max_context: int = 0) -> ModelConfig:
    return read_config(open_checkpoint(folder).config, None, max_context)


def test_longrope_takes_its_short_divisors_where_no_context_will_be_long(tmp_path: Path) -> None:
    """Those of keys in the cache cannot change any more."""
    folder = tiny(tmp_path, "phi3-longrope")
    long, short = read(folder).ropes[0], read(folder, max_context=32).ropes[0]
    assert short.inverse_frequencies[0] == 1.0
    assert long.inverse_frequencies[1] == pytest.approx(short.inverse_frequencies[1] * 1.1 / 2)
    assert read(folder, max_context=33).ropes[0] == long
    assert long.magnitude == short.magnitude > 1.0
    backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(folder), backend, max_context=32)
    assert model.config.ropes[0] == short


@needs_native
def test_rows_may_be_packed_a_few_at_a_time_though_heads_rotate_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of large matrices are: the pieces end within heads."""
    folder = tiny(tmp_path, "phi3-longrope")
    whole, _ = program_of(folder, "native", None)
    monkeypatch.setattr("kernels.cpu.native_weights.PACKED_AT_ONCE", 5 * 64)
    pieces, _ = program_of(folder, "native", None)
    logits = [logits_of(program, TOKENS, [60]) for program in (whole, pieces)]
    assert torch.equal(*logits)


def test_smollm3_shares_its_table_unless_it_says_otherwise(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "smollm3")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read(folder).tied_embeddings


def test_yarn_reaches_beyond_what_the_configuration_counts(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen2-yarn", max_position_embeddings=32)
    assert read(folder).max_context == 8 * 32
    assert read(tiny(tmp_path / "plain", "qwen2")).max_context == 256
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read(folder).max_context == 8 * 32, "what it knows is what it was trained for"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "lacks 'original_max"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "llama_4_scaling_beta": 0.1}},
            "llama_4_scaling_beta is set without",
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'; these work: linear, llama3"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor is 0.2, of heads of 16"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, of heads of 16"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "1 entries for 4 layers"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "long_factor": [1.0],
                    "original_max_position_embeddings": 32,
                }
            },
            "long_factor has 1 entries, not 8",
        ),
        ({"residual_multiplier": 0}, "residual_multiplier = 0, not above zero"),
    ],
)
def test_what_cannot_be_computed_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=message):
        read(folder)


def test_a_stacked_tensor_has_to_have_rows_for_all_heads(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "folder", "phi3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.qkv_proj.weight' has 128"):
        open_checkpoint(folder).tensor("model.layers.0.self_attn.k_proj.weight")
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": None}))
    with pytest.raises(ConfigError, match="None and 2 attention heads"):
        open_checkpoint(folder)
