"""Configurations that would give another model than they mean are refused."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ConfigError
from engine.models.config import read_config
from tests.tiny import DEEPSEEK, LLAMA

NESTED = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_atention"]}, "'sliding_atention'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window"),
        ({"rope_parameters": NESTED}, "differ between kinds of layers"),
        (DEEPSEEK | {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
        (DEEPSEEK | {"kv_lora_rank": 0}, "kv_lora_rank"),
        (DEEPSEEK | {"n_group": 8, "topk_group": 2}, "n_group = 8"),
    ],
)
def test_it_is_refused(changes: dict[str, Any], message: str) -> None:
    read_config(LLAMA | DEEPSEEK if "kv_lora_rank" in changes else dict(LLAMA), None)
    with pytest.raises(ConfigError, match=message):
        read_config(LLAMA | changes, None)
