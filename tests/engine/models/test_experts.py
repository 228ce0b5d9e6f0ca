"""What configurations and files say, and do not say, of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.models.config import ModelConfig, read_config
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import tiny

TOKENS = list(range(3, 63))
SHARED = "model.layers.1.mlp.shared_experts.gate_proj.bias"


def read(folder: Path, family: str, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    """The configuration of a tiny model without some keys and with others."""
    raw = json.loads((tiny(folder, family) / "config.json").read_text())
    return read_config({k: v for k, v in raw.items() if k not in without} | changes, None)


def test_what_is_not_said_is_as_the_family_has_it(tmp_path: Path) -> None:
    keys = ("moe_layer_start_index", "moe_num_shared_experts")
    ernie = read(tmp_path / "ernie", "ernie4_5_moe", keys, moe_layer_end_index=None)
    assert ernie.expert_layers == {1, 3}, "every other one behind the first"
    assert ernie.experts is not None
    assert ernie.experts.shared == 2
    glm = read(tmp_path / "glm", "glm4_moe", ("first_k_dense_replace", "n_shared_experts"))
    assert glm.expert_layers == {1, 2, 3}
    assert glm.experts is not None
    assert glm.experts.shared == 1
    dots = read(tmp_path / "dots", "dots1", first_k_dense_replace=None, n_shared_experts=None)
    assert dots.expert_layers == {0, 1, 2, 3}
    assert dots.experts is not None
    assert dots.experts.shared == 0


def test_upper_layers_of_dots_slide(tmp_path: Path) -> None:
    changes = {"sliding_window": 16, "max_window_layers": 2}
    assert read(tmp_path, "dots1", ("layer_types",), **changes).windows == (0, 0, 16, 16)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("glm4_moe", {"n_group": 2, "topk_group": 3}, "n_group = 2"),
        ("glm4_moe", {"n_group": 4, "topk_group": 1}, "n_group = 4"),
        ("glm4_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
        ("ernie4_5_moe", {"moe_layer_end_index": "all"}, "are no layers of experts"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window = None"),
        ("gpt_oss", {"num_experts_per_tok": None}, "num_experts_per_tok = None"),
    ],
)
def test_what_cannot_be_computed_is_named(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, family, **changes)


def test_shared_experts_may_have_a_bias_of_zeros_and_no_other(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "glm4_moe")
    before = run(folder, "torch", [60], TOKENS)
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {SHARED: torch.zeros(64)}, folder / "model.safetensors")
    assert torch.equal(run(folder, "torch", [60], TOKENS), before)
    save_file(stored | {SHARED: torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="has a bias, which shared experts cannot"):
        run(folder, "torch", [60], TOKENS)


def test_layers_that_guess_ahead_are_passed_over_and_no_others(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "glm4_moe")
    before = run(folder, "torch", [60], TOKENS)
    stored = load_file(folder / "model.safetensors")
    ahead = {"model.layers.4.eh_proj.weight": torch.ones(4, 4)}
    save_file(stored | ahead, folder / "model.safetensors")
    assert torch.equal(run(folder, "torch", [60], TOKENS), before)
    further = {"model.layers.5.eh_proj.weight": torch.ones(4, 4)}
    save_file(stored | further, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no place for, such as 'model\.layers\.5\."):
        run(folder, "torch", [60], TOKENS)
