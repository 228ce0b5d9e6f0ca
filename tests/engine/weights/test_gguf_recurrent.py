"""GGUF files of Qwen3-Next, Qwen 3.5 and LFM2, as llama.cpp's converter writes them: the logits are
those of the folder that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.models import load_model
from engine.models.config import read_config
from engine.models.shard import Shard
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf_recurrent import CONV_NAMES, NAMES, WHOLE_NAMES
from engine.weights.renamed import usual_name
from kernels.backend import select_backend
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import tiny
from tests.engine.weights.test_gguf import GGUF_NAMES, write_out, writer_of
from tests.engine.weights.test_gguf_families import STACKS, TOKENS, stacked_experts

OWN = GGUF_NAMES | STACKS | {ours: theirs for theirs, ours in (NAMES | WHOLE_NAMES).items()}
CONV = {
    **GGUF_NAMES,
    **STACKS,
    **{ours: theirs for theirs, ours in CONV_NAMES.items()},
    "model.norm": "token_embd_norm",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
FILES = {"qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe", "qwen3_next": "qwen3next"}


def tiled(tensor: torch.Tensor, heads: tuple[int, int], dimension: int = 0) -> torch.Tensor:
    """Value heads in turns with the key heads."""
    keys, values = heads
    moved = tensor.movedim(dimension, 0)
    shaped = moved.reshape(keys, values // keys, -1, *moved.shape[1:])
    return shaped.transpose(0, 1).reshape(moved.shape).movedim(0, dimension).contiguous()


def as_ggml(name: str, x: torch.Tensor, config: dict[str, Any], turns: bool) -> torch.Tensor:
    """A tensor as the converter changes it."""
    heads = (config["linear_num_key_heads"], config["linear_num_value_heads"])
    vectors = 2 * heads[0] * config["linear_key_head_dim"]
    if name.endswith("norm.weight"):
        return x if "linear_attn" in name else x + 1
    if name.endswith("A_log"):
        x = -x.exp()
    if name.endswith("conv1d.weight"):
        x = x.squeeze(1)
    if not turns or "linear_attn" not in name:
        return x.squeeze(0) if name.endswith("shared_expert_gate.weight") else x
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return torch.cat((x[:vectors], tiled(x[vectors:], heads)))
    return tiled(x, heads, 1 if name.endswith("out_proj.weight") else 0)


def unmixed(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Qwen3-Next's projections, of which the file has queries, keys and values together."""
    found: dict[str, torch.Tensor] = {}
    keys, share = config["linear_num_key_heads"], config["linear_num_value_heads"]
    wide = share // keys * config["linear_value_head_dim"]
    dim = config["linear_key_head_dim"]
    for name, tensor in tensors.items():
        if not name.endswith("in_proj_qkvz.weight"):
            found[name] = tensor
            continue
        parts = tensor.view(keys, -1, tensor.shape[1]).split([dim, dim, wide, wide], 1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        found[name.replace("qkvz", "qkv")] = torch.cat((q, k, v))
        found[name.replace("qkvz", "z")] = z.contiguous()
    return found


def convert(
    folder: Path, file: Path, architecture: str, *, older: bool = False, **changes: Any
) -> None:
    """Write the file, as `older` converters wrote Qwen3-Next's if that is asked for."""
    config = json.loads((folder / "config.json").read_text()) | changes
    blocks = config["num_hidden_layers"] + 1  # one that guesses further ahead
    width = config.get("intermediate_size") or config["moe_intermediate_size"]
    sizes = {"num_hidden_layers": blocks, "intermediate_size": width}
    writer = writer_of(file, architecture, config | sizes)
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"] // 4)
    writer.add_nextn_predict_layers(1)
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    inner = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    writer.add_ssm_inner_size(config.get("inner", inner))
    if architecture == "qwen3next":
        kinds = [kind == "linear_attention" for kind in config["layer_types"]]
        writer.add_array(f"{architecture}.attention.recurrent_layers", [*kinds, False])
    writer.add_uint32(f"{architecture}.full_attention_interval", 4)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    tensors = load_file(folder / "model.safetensors")
    tensors = tensors if older else unmixed(tensors, config)
    for name, tensor in stacked_experts(tensors).items():
        turns = architecture != "qwen3next"
        array = as_ggml(name, tensor, config, turns).numpy()
        writer.add_tensor(file_name(name), np.ascontiguousarray(array))
    writer.add_tensor(f"blk.{blocks - 1}.nextn.eh_proj.weight", np.ones((4, 4), np.float32))
    write_out(writer)


def file_name(name: str, names: dict[str, str] = OWN) -> str:
    base, _, kind = name.rpartition(".")
    if base in names:
        return f"{names[base]}.{kind}"
    layer, part = name.split(".", 3)[2:]
    if part in names:
        return f"blk.{layer}.{names[part]}"
    return f"blk.{layer}.{names[part.removesuffix(f'.{kind}')]}.{kind}"


def convert_conv(folder: Path, file: Path, architecture: str) -> None:
    """LFM2's, whose layers without attention have no key and value heads."""
    config = json.loads((folder / "config.json").read_text())
    attends = [kind == "full_attention" for kind in config["layer_types"]]
    sizes = {
        "num_key_value_heads": [config["num_key_value_heads"] * attending for attending in attends],
        "intermediate_size": read_config(open_checkpoint(folder).config, None).intermediate,
        "rms_norm_eps": config["norm_eps"],
    }
    writer = writer_of(file, architecture, config | sizes)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    stored = load_file(folder / "model.safetensors")
    tensors = {usual_name(config["model_type"], name): t for name, t in stored.items()}
    for name, tensor in stacked_experts(tensors).items():
        array = tensor.squeeze(1) if "conv.conv" in name else tensor
        writer.add_tensor(file_name(name, CONV), np.ascontiguousarray(array.numpy()))
    write_out(writer)


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
def test_convolutions_give_the_logits_of_their_folder(tmp_path: Path, family: str) -> None:
    # The file has no width of heads.
    folder = tiny(tmp_path / "folder", family, hidden_size=64)
    file = tmp_path / "model.gguf"
    convert_conv(folder, file, family.replace("_", ""))
    results = [run(path, "torch", [17, len(TOKENS) - 17], TOKENS) for path in (file, folder)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert float(results[0].std()) > 0.03


def test_convolutions_are_known_by_their_missing_heads(tmp_path: Path) -> None:
    folder, file = tiny(tmp_path / "folder", "qwen3"), tmp_path / "model.gguf"
    config = json.loads((folder / "config.json").read_text())
    writer = writer_of(file, "lfm2", config)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    write_out(writer)
    with pytest.raises(ConfigError, match=r"head_count_kv is 2, not one for each layer"):
        open_checkpoint(file)


@pytest.mark.parametrize("family", FILES)
def test_a_family_gives_the_logits_of_its_folder(tmp_path: Path, family: str) -> None:
    dense = {"mlp_only_layers": []} if family == "qwen3_next" else {}
    folder, file = tiny(tmp_path / "folder", family, **dense), tmp_path / "model.gguf"
    convert(folder, file, FILES[family])
    results = [run(path, "torch", [17, len(TOKENS) - 17], TOKENS) for path in (file, folder)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert float(results[0].std()) > 0.03


def test_older_files_have_projections_as_the_folder_does(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "folder", "qwen3_next", mlp_only_layers=[])
    file = tmp_path / "model.gguf"
    convert(folder, file, "qwen3next", older=True)
    results = [run(path, "torch", [len(TOKENS)], TOKENS) for path in (file, folder)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_heads_in_ggmls_order_stay_on_one_rank(tmp_path: Path) -> None:
    """Those of one rank's key heads do not lie together."""
    folder, file = tiny(tmp_path / "folder", "qwen3_5"), tmp_path / "model.gguf"
    convert(folder, file, "qwen35")
    backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
    with pytest.raises(ConfigError, match="ggml's order, which several ranks cannot share out"):
        load_model(open_checkpoint(file), backend, shard=Shard(0, 2))


def test_a_width_that_is_not_shared_out_is_named(tmp_path: Path) -> None:
    folder, file = tiny(tmp_path / "folder", "qwen3_5"), tmp_path / "model.gguf"
    convert(folder, file, "qwen35", inner=260)
    with pytest.raises(ConfigError, match=r"ssm\.inner_size 260 is not shared out to 8 heads"):
        open_checkpoint(file)


def test_the_writer_is_llama_cpps() -> None:
    """The names above are those of ggml's own table."""
    known = gguf.TENSOR_NAMES.values()
    for name in (*NAMES, *(name.removesuffix(".bias") for name in WHOLE_NAMES)):
        assert f"blk.{{bid}}.{name}" in known
