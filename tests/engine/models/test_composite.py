"""The text part of models that see, against the whole of them in `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.models import load_model
from engine.models.config import read_config
from engine.weights.checkpoint import open_checkpoint
from engine.weights.composite import text_config
from kernels.backend import select_backend
from tests.engine.models.test_parity import (
    COMMON,
    DELTA,
    GATED_EXPERTS,
    GEMMA4,
    GEMMA4_SMALL,
    run,
)

SEES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_SEES = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32}
UNIFIED = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 16,
                "sliding_window": 7,
            },
            "vision_config": SEES | {"model_type": "siglip_vision_model"},
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral"},
            "vision_config": SEES | {"model_type": "pixtral", "head_dim": 16},
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {"rope_parameters": MROPE},
            "vision_config": QWEN_SEES | {"out_hidden_size": 64},
        },
    ),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {
            "text_config": {"rope_parameters": MROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN_SEES | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3-vl-experts": (
        "Qwen3VLMoeConfig",
        {
            "text_config": GATED_EXPERTS | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN_SEES | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3.5": (
        "Qwen3_5Config",
        {"text_config": DELTA, "vision_config": QWEN_SEES | {"out_hidden_size": 64}},
    ),
    "qwen3.5-experts": (
        "Qwen3_5MoeConfig",
        {
            "text_config": DELTA | GATED_EXPERTS,
            "vision_config": QWEN_SEES | {"out_hidden_size": 64},
        },
    ),
    "lfm2-vl": (
        "Lfm2VlConfig",
        {
            "text_config": {
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention", "conv", "conv"],
            },
            "vision_config": SEES | {"model_type": "siglip2_vision_model", "num_patches": 4},
        },
    ),
    "gemma4": (
        "Gemma4Config",
        {
            "text_config": GEMMA4 | GEMMA4_SMALL | {"model_type": "gemma4_text"},
            "vision_config": None,
        },
    ),
    "gemma4-unified": (
        "Gemma4UnifiedConfig",
        {"text_config": GEMMA4 | UNIFIED | {"model_type": "gemma4_unified_text"}},
    ),
}
TOKENS = torch.randint(3, 110, (60,), generator=torch.Generator().manual_seed(1))


def write(folder: Path, name: str) -> torch.nn.Module:
    kind, parts = MODELS[name]
    text = COMMON | {"hidden_size": 64, "tie_word_embeddings": False} | parts["text_config"]
    whole = {"tie_word_embeddings": False, "image_token_id": 119, "image_token_index": 119}
    config = getattr(transformers, kind)(**(parts | whole | {"text_config": text}))
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_text_part_computes_what_the_whole_does(tmp_path: Path, name: str) -> None:
    model = write(tmp_path, name)
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    logits = run(tmp_path, "torch", [17, 43], TOKENS.tolist())
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5


def test_older_files_of_it_are_the_same_model(tmp_path: Path) -> None:
    """Of Gemma, which named its tensors otherwise and left out what most sizes share; and of Qwen,
    whose configuration had one level."""
    write(tmp_path, "gemma3")
    newer = run(tmp_path, "torch", [60], TOKENS.tolist())
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        older = name.replace("model.language_model.", "language_model.model.")
        tensors[f"language_model.{name}" if name.startswith("lm_head.") else older] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(run(tmp_path, "torch", [60], TOKENS.tolist()), newer)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_config"]["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(open_checkpoint(tmp_path).config, None).heads.dim == 256

    folder = tmp_path / "qwen"
    write(folder, "qwen2.5-vl")
    newer = run(folder, "torch", [60], TOKENS.tolist())
    config = json.loads((folder / "config.json").read_text())
    config = config.pop("text_config") | config
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(run(folder, "torch", [60], TOKENS.tolist()), newer)


def test_a_part_that_is_no_known_family_is_refused_by_the_whole_ones_name(tmp_path: Path) -> None:
    write(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "another"
    (tmp_path / "config.json").write_text(json.dumps(config))
    backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
    with pytest.raises(ConfigError, match="model_type is 'gemma3'; these can be served"):
        load_model(open_checkpoint(tmp_path), backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention", "linear_attention"] * 3}, "'linear_attention'"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 99}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 5}, "leaves no keys for layer 1"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "layer 1 has"),
        ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping"),
        ({"use_bidirectional_attention": "all"}, "left to right"),
        (
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 5}}},
            "partial_rotary_factor is 5",
        ),
    ],
)
def test_a_gemma_4_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    raw = COMMON | GEMMA4 | GEMMA4_SMALL | {"model_type": "gemma4_text"} | changes
    with pytest.raises(ConfigError, match=message):
        read_config(raw, None)


def test_null_means_no_vectors_for_layers() -> None:
    raw = COMMON | GEMMA4 | {"model_type": "gemma4_text"}
    assert read_config(raw, None).inputs is not None
    assert read_config(raw | {"hidden_size_per_layer_input": None}, None).inputs is None
    whole = text_config({"text_config": raw | {"hidden_size_per_layer_input": None}})
    assert whole is not None
    assert read_config(whole, None).inputs is None
