"""GGUF files of experts, and models split into several files."""

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
from engine.weights.checkpoint import open_checkpoint
from engine.weights.files import weight_files
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import tiny
from tests.engine.weights.test_gguf import (
    gguf_name,
    rows_as_stored,
    write_gguf,
    write_out,
    writer_of,
)
from tests.tiny import LLAMA, llama_tensors

EXPERT = re.compile(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight")
EXPERT_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPERT_PARTS |= {"w1": "gate", "w3": "up", "w2": "down"}


def write_expert_gguf(folder: Path, path: Path, architecture: str, *, stacked: bool) -> None:
    """The model in `folder`, with a tensor for all experts or, as in older files, for each."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    writer = writer_of(path, architecture, config)
    writer.add_key_length(config["head_dim"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    layers: dict[tuple[str, str], dict[int, np.ndarray[Any, Any]]] = {}
    for name, tensor in tensors.items():
        array = tensor.numpy()
        if found := EXPERT.fullmatch(name):
            layer, number, part = found.groups()
            layers.setdefault((layer, EXPERT_PARTS[part]), {})[int(number)] = array
            continue
        array = rows_as_stored(name, array, architecture, config)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    for (layer, part), experts in layers.items():
        arrays = [experts[n] for n in range(len(experts))]
        if stacked:
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", np.stack(arrays))
            continue
        for number, array in enumerate(arrays):
            writer.add_tensor(f"blk.{layer}.ffn_{part}.{number}.weight", array)
    write_out(writer)


@pytest.mark.parametrize(
    ("family", "architecture", "stacked"),
    [
        ("qwen3-experts", "qwen3moe", True),
        ("mixtral", "llama", True),
        ("mixtral", "llama", False),
    ],
)
def test_experts_in_a_gguf_file_are_those_of_the_same_model_in_safetensors(
    tmp_path: Path, family: str, architecture: str, stacked: bool
) -> None:
    # A GGUF file does not say which layers are dense.
    folder = tiny(tmp_path / "folder", family, mlp_only_layers=[])
    file = tmp_path / "model.gguf"
    write_expert_gguf(folder, file, architecture, stacked=stacked)
    tokens = list(range(3, 40))
    results = [run(path, "torch", [len(tokens)], tokens) for path in (file, folder)]
    assert torch.equal(results[0], results[1])
    assert float(results[0].std()) > 0.1


@pytest.mark.parametrize("name", ["ffn_up_exps.{x}", "{", "a{}b", "ffn_up_exps.{"])
def test_braces_in_a_name_are_only_braces(tmp_path: Path, name: str) -> None:
    path = tmp_path / "braces.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor(f"blk.0.{name}", np.zeros((2, 4, 32), np.float32))
    write_out(writer)
    assert len(open_checkpoint(path).names()) in (2, 3)


def test_a_tensor_of_experts_without_them_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flat.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 32), np.float32))
    write_out(writer)
    with pytest.raises(ConfigError, match=r"'blk\.0\.ffn_up_exps\.weight' has shape \[4, 32\]"):
        open_checkpoint(path)


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """A model in parts of seven tensors."""
    write_gguf(tmp_path / "tiny.gguf", tensors_a_part=7)
    return sorted(tmp_path.glob("*.gguf"))


def test_a_model_in_parts_is_one_whichever_part_is_named(split: list[Path]) -> None:
    assert split[0].name == "tiny-00001-of-00003.gguf"
    expected = llama_tensors(LLAMA)
    for named in split:
        checkpoint = open_checkpoint(named)
        assert checkpoint.path == split[0]
        assert checkpoint.config["vocab_size"] == LLAMA["vocab_size"]
        assert checkpoint.names() == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensor(name).dense(), tensor), name
    assert weight_files(split[1]) == split


def test_a_missing_part_and_one_under_another_name_are_named(split: list[Path]) -> None:
    taken = split[1].rename(split[1].with_name("elsewhere.gguf"))
    with pytest.raises(ConfigError, match=r"tiny-00002-of-00003\.gguf is missing"):
        open_checkpoint(split[0])
    with pytest.raises(ConfigError, match=r"elsewhere\.gguf says that it is number 1"):
        open_checkpoint(taken)
    for number in ("00000-of-00003", "00004-of-00003", "00000-of-00000"):
        with pytest.raises(ConfigError, match="there is no such part; the first is 00001"):
            open_checkpoint(split[0].with_name(f"tiny-{number}.gguf"))
    taken.write_bytes(split[2].read_bytes())
    taken.rename(split[1])
    with pytest.raises(ConfigError, match=r"tiny-00002-of-00003\.gguf says that it is number 2"):
        open_checkpoint(split[0])
