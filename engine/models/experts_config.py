"""What configurations say of layers of experts."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.models.gemma4_config import GEMMA4
from engine.models.latent_config import DEEPSEEK2, DEEPSEEK3, GLM_LITE
from engine.models.names import GPT_OSS, LFM2_MOE, QWEN3_NEXT, QWEN35_MOE
from engine.models.values import Values
from engine.weights.checkpoint import MAX_EXPERTS

# Families with experts, and whether their probabilities are made to sum to 1 if their configuration
# does not say; those whose probabilities are each score's own.
EXPERTS = {
    "mixtral": True,
    "qwen3_moe": False,
    GPT_OSS: True,
    "glm4_moe": True,
    "dots1": False,
    "ernie4_5_moe": True,
    "qwen2_moe": False,
    LFM2_MOE: True,
    QWEN35_MOE: True,
    QWEN3_NEXT: True,
    GEMMA4: True,
    DEEPSEEK2: False,
    DEEPSEEK3: True,
    GLM_LITE: True,
}
SIGMOID = ("glm4_moe", "dots1", LFM2_MOE, DEEPSEEK3, GLM_LITE)
# Whose shared expert has a gate.
GATED_SHARED = ("qwen2_moe", QWEN35_MOE, QWEN3_NEXT)
# Whose first layer is dense if their configuration does not say, and how many experts all tokens
# go through then.
FIRST_DENSE = ("glm4_moe", "ernie4_5_moe", GLM_LITE)
SHARED_UNSAID = {"glm4_moe": 1, "ernie4_5_moe": 2, GLM_LITE: 1}
# What families, and versions of `transformers`, call the number of experts, of a token's, and of
# those that every token goes through.
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "moe_k", "top_k_experts")
SHARED = ("n_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class ExpertsConfig:
    """Layers of `count` experts, each `width` wide, of which a token goes through `used`, and
    through `shared` others; `preferred` if some are chosen before they are likelier. The rest is as
    in `kernels.ops.Experts`."""

    count: int
    used: int
    width: int
    normalized: bool
    sigmoid: bool = False
    scale: float = 1.0
    shared: int = 0
    preferred: bool = False
    gated: bool = False
    groups: int = 1
    kept: int = 1


def read_experts(values: Values, model_type: str) -> ExpertsConfig | None:
    """Those of families that have some."""
    raw = values.raw
    if model_type not in EXPERTS or (model_type == GEMMA4 and not raw.get("enable_moe_block")):
        return None
    qwen = model_type == "qwen3_moe"
    counts = ("num_experts", *COUNTS) if qwen else COUNTS
    count = values.integer(values.known(counts), most=MAX_EXPERTS)
    used = values.integer(values.known(USED), 2 if model_type == "mixtral" else None)
    if used > count:
        raise ConfigError(f"num_experts_per_tok is {used}, but there are {count} experts")
    groups, kept = _groups(values, count, used)
    width = "moe_intermediate_size"
    own = model_type not in ("mixtral", GPT_OSS)
    expert = values.integer(width if own or width in raw else "intermediate_size")
    if model_type in GATED_SHARED:
        return _gated_shared(values, count, used, expert, model_type)
    shared = values.known(SHARED)
    unsaid = 0 if any(name in raw for name in SHARED) else SHARED_UNSAID.get(model_type, 0)
    return ExpertsConfig(
        count,
        used,
        expert,
        normalized=bool(raw.get("norm_topk_prob", EXPERTS[model_type])),
        sigmoid=model_type in SIGMOID,
        scale=values.number("routed_scaling_factor", 1.0),
        shared=values.integer(shared) if raw.get(shared) else unsaid,
        preferred=model_type in (*SIGMOID, "ernie4_5_moe"),
        groups=groups,
        kept=kept,
    )


def _groups(values: Values, count: int, used: int) -> tuple[int, int]:
    """Into how many groups experts are cut, and of how many of those some are chosen."""
    groups = values.integer("n_group", 1)
    if groups == 1 or values.raw.get("topk_method") == "greedy":
        return 1, 1
    kept = values.integer("topk_group")
    size = count // groups
    if count % groups or size < 2 or not kept <= groups or used > kept * size:
        raise ConfigError(
            f"{used} of {count} experts cannot be chosen from {kept} of n_group = {groups} groups"
        )
    return groups, kept


def _gated_shared(
    values: Values, count: int, used: int, width: int, model_type: str
) -> ExpertsConfig:
    """Experts of families with a shared one of a width and a gate of its own."""
    wide = values.integer("shared_expert_intermediate_size", width)
    if wide % width:
        raise ConfigError(
            f"shared_expert_intermediate_size {wide} is no multiple of the experts' {width}"
        )
    normalized = bool(values.raw.get("norm_topk_prob", EXPERTS[model_type]))
    return ExpertsConfig(count, used, width, normalized, shared=wide // width, gated=True)


def expert_layers(values: Values, layers: int) -> frozenset[int]:
    """All layers, but for those that the configuration leaves dense: by number (Qwen), the first
    ones (GLM), or those outside a range (ERNIE)."""
    raw = values.raw
    if kinds := raw.get("mlp_layer_types"):
        if len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
            raise ConfigError(f"mlp_layer_types are not {layers} of 'dense' and 'sparse'")
        return frozenset(n for n, kind in enumerate(kinds) if kind == "sparse")
    dense = raw.get("mlp_only_layers") or []
    step = values.integer(values.known(("decoder_sparse_step", "moe_layer_interval")), 1)
    first = raw.get(
        values.known(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"))
    )
    if first is None:
        kind = raw.get("model_type")
        first = 2 if kind == LFM2_MOE else int(kind in FIRST_DENSE)
    last = raw.get("moe_layer_end_index")
    last = -1 if last is None else last
    if type(first) is not int or type(last) is not int:
        raise ConfigError(f"layers {first!r} to {last!r} are no layers of experts")
    last = layers - 1 if last < 0 else last
    return frozenset(n for n in range(first, last + 1) if n not in dense and (n + 1) % step == 0)
