"""What configurations say of multi-head latent attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.models.values import Values
from kernels.ops import LatentHeads

DEEPSEEK2, DEEPSEEK3 = "deepseek_v2", "deepseek_v3"
GLM_LITE = "glm4_moe_lite"
# Heads' own projections begin at tiles of the CPU kernels.
WIDTH_UNIT = 16
# Families whose attention is of that kind.
LATENT = (DEEPSEEK2, DEEPSEEK3, GLM_LITE)


@dataclass(frozen=True)
class LatentConfig:
    """`heads`, each of whose values are `value` wide; queries are projected by way of
    `query_rank` values, or at once if that is 0."""

    heads: LatentHeads
    value: int
    query_rank: int


def read_latent(values: Values) -> LatentConfig:
    """The widths of heads, and of what is cached in place of them."""
    heads = LatentHeads(
        values.integer("num_attention_heads"),
        values.integer("kv_lora_rank"),
        values.integer("qk_nope_head_dim"),
        values.integer("qk_rope_head_dim"),
    )
    if heads.turned % 2:
        raise ConfigError(f"qk_rope_head_dim is {heads.turned}; rotation needs an even one")
    value = values.integer("v_head_dim")
    for name, width in (("kv_lora_rank", heads.rank), ("v_head_dim", value)):
        if width % WIDTH_UNIT:
            raise ConfigError(
                f"{name} is {width}; latent attention takes multiples of {WIDTH_UNIT}"
            )
    rank = values.integer("q_lora_rank") if values.raw.get("q_lora_rank") else 0
    return LatentConfig(heads, value, rank)


def latent_scale(raw: dict[str, Any], heads: LatentHeads) -> float:
    """What scores are multiplied by: where YaRN stretches positions, they also grow with its
    factor, which queries and keys then do not."""
    scale = float((heads.plain + heads.turned) ** -0.5)
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    weight, factor = scaling.get("mscale_all_dim"), float(scaling.get("factor") or 1.0)
    stretched = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    if not stretched or not weight or factor <= 1:
        return scale
    growth = 0.1 * float(weight) * math.log(factor) + 1.0
    return scale * growth * growth
