"""OLMo 2 and 3: norms over the heads of all ranks on the native kernels, and which layers slide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.models.config import ModelConfig, read_config
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import CHUNKS, TOKENS, on_one_and, tiny
from tests.kernels.native import INSTRUCTION_SETS, logits_in_chunks, needs_native, program_of

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.2,
}


@needs_native
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("family", ["olmo2", "olmo3-yarn"])
def test_the_native_kernels_give_torchs_logits(
    tmp_path: Path, family: str, instructions: str
) -> None:
    folder = tiny(tmp_path, family)
    program, _ = program_of(folder, weights="float32", cache="float32", instructions=instructions)
    wanted = run(folder, "torch", [len(TOKENS)], TOKENS)
    error = (logits_in_chunks(program, TOKENS, CHUNKS) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 1e-5


@needs_native
@pytest.mark.parametrize("ranks", [3, 4, 6])
def test_ranks_that_share_key_heads_count_each_once(tmp_path: Path, ranks: int) -> None:
    """Exactly, so that a head that two ranks hold would be noticed however small its share."""
    path = tiny(tmp_path, "olmo2", num_attention_heads=6, hidden_size=96)
    one, several = on_one_and(path, "native", ranks, exact=True)
    assert all(torch.equal(one, logits) for logits in several)


def read(folder: Path, **changes: Any) -> ModelConfig:
    config = json.loads((folder / "config.json").read_text()) | changes
    return read_config({k: v for k, v in config.items() if v is not None}, None)


def test_three_of_four_layers_slide_if_the_configuration_does_not_say(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "olmo3")
    assert read(folder).windows == (7, 7, 7, 0)
    assert read(folder, layer_types=None).windows == (7, 7, 7, 0)
    with pytest.raises(ConfigError, match="sliding_window = None"):
        read(folder, sliding_window=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "rope_theta": 3e5, "rope_scaling": YARN},
        {"rope_parameters": YARN | {"rope_theta": 3e5}},
        {
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 3e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e5},
            }
        },
    ],
    ids=["beside", "flat", "by kind"],
)
def test_only_layers_that_see_everything_are_scaled(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """As files of three ages of `transformers` say it."""
    config = read(tiny(tmp_path, "olmo3", max_position_embeddings=32), **changes)
    near, whole = config.ropes[0], config.ropes[3]
    assert near.inverse_frequencies == pytest.approx([3e5 ** (-n / 8) for n in range(8)])
    assert near.magnitude == 1.0
    assert whole.inverse_frequencies[-1] == pytest.approx(near.inverse_frequencies[-1] / 8)
    assert whole.magnitude == 1.2
    assert config.max_context == 256
