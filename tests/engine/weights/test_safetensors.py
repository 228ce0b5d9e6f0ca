"""Folders in Hugging Face layout: shards, index, formats, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from tests.tiny import EXPERTS, LLAMA, llama_tensors, write_llama


def load(folder: Path) -> Any:
    return load_model(
        open_checkpoint(folder),
        select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)[0],
    )


def test_shards_with_an_index_are_one_model(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    tensors = llama_tensors(LLAMA)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    for name in names:
        assert torch.equal(checkpoint.tensor(name).dense(), tensors[name])
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lies in model-1\.safetensors, but it does not"):
        open_checkpoint(folder)


def test_weights_in_a_second_layout_beside_them_are_left_alone(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.ones(1)}, folder / "consolidated.safetensors")
    assert load(folder).config.layers == 2


@pytest.mark.parametrize("names", [[], {"a": 1}, {"a": "../../etc/model.safetensors"}])
def test_an_index_that_cannot_be_trusted_is_refused(tmp_path: Path, names: object) -> None:
    folder = write_llama(tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match="no 'weight_map' of tensors to file names"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_llama(tmp_path)
    tensors = {n: t.to(dtype) for n, t in llama_tensors(LLAMA).items()}
    save_file(tensors, folder / "model.safetensors")
    tensor = open_checkpoint(folder).tensor("model.norm.weight")
    assert tensor.dense().dtype == dtype
    with pytest.raises(ValueError, match="not in blocks"):
        tensor.packed()
    assert load(folder).config.layers == 2


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = llama_tensors(LLAMA)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


NORM = "model.norm.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"no tensor '{NORM}'"),
        ({NORM: torch.ones(31)}, f"'{NORM}' has shape \\[31\\], but the configuration says \\[32"),
        ({NORM: torch.ones(32, dtype=torch.int32)}, f"'{NORM}' is stored as I32"),
        ({"extra.weight": torch.ones(1)}, "1 tensors that a llama model has no place for"),
        ({Q_BIAS: torch.ones(32)}, "only some of"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = write_llama(tmp_path)
    change(folder, changes)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_tied_models_may_still_carry_their_head(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, tie_word_embeddings=True)
    model = load(folder)
    assert model.head is model.embedding


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:-100], whole[:4], b"\xff" * 200, b""):
        weights.write_bytes(data)
        with pytest.raises(ConfigError, match=r"model\.safetensors is corrupt or truncated"):
            open_checkpoint(folder)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="unpickling runs code"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "not valid JSON"), ("[]", "not hold a JSON object"), (None, "cannot read")],
)
def test_a_bad_configuration_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    folder = write_llama(tmp_path)
    config = folder / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


def test_other_files_and_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ConfigError, match="quantized with aqlm"):
        open_checkpoint(folder)
    other = tmp_path / "weights.pt"
    other.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"neither a \.gguf file nor a folder"):
        open_checkpoint(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers = 2147483648, above 4096"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings = 2147483648, above"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"num_key_value_heads": 3}, "no multiple of key/value heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "of type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"model_type": "mixtral"}, "num_local_experts = None"),
        ({"model_type": "qwen3_moe"}, "num_experts = None"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok = None"),
        (EXPERTS | {"num_local_experts": 1 << 20}, "num_local_experts = 1048576, above 4096"),
        (EXPERTS | {"num_experts_per_tok": 5}, "is 5, but there are 4 experts"),
        (EXPERTS | {"intermediate_size": 40}, "is 40; experts take multiples of 16"),
        (EXPERTS, r"no tensor 'model\.layers\.0\.mlp\.gate\.weight'"),
        ({"layer_types": 3}, "malformed"),
        ({"rope_theta": "abc"}, "malformed"),
        ({"rope_scaling": 5}, "malformed"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "malformed"),
    ],
)
def test_configurations_that_cannot_be_served_name_the_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ConfigError, match=message):
        load(folder)
