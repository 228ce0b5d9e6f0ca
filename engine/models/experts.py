"""Feed-forward layers of many experts, of which each token goes through a few (mixture of experts,
arXiv 2101.03961; Mixtral, arXiv 2401.04088; Qwen3, arXiv 2505.09388; gpt-oss, arXiv 2508.10925).

Ranks share them out whole: each computes what its own experts say to every row, and the ranks'
answers are added.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.layers import GatedFeedForward, load_feed_forward
from engine.models.loader import WeightLoader
from kernels.ops import Experts, Ops, T, Weight

# Experts' outputs begin at tiles of the CPU kernels.
WIDTH_UNIT = 16
ERNIE_PREFERENCE = "moe_statics.e_score_correction_bias"


@dataclass(frozen=True)
class ExpertsFeedForward:
    """A router, and the experts of this rank.

    With several ranks either the sums over a row's experts are added (`adds_sums`), or, so that the
    bits are those of one rank, each expert's answer (`adds_parts`).
    """

    router: Weight
    gate_up: Weight
    down: Weight
    preference: Weight | None
    factors: Weight | None
    experts: Experts
    adds_parts: bool
    adds_sums: bool

    def forward(self, ops: Ops[T], x: T, config: ModelConfig, routed: T | None = None) -> T:
        """`[rows, hidden] -> [rows, hidden]`. The router sees `routed`, if that is given."""
        scores = ops.linear(x if routed is None else routed, self.router)
        parts = ops.experts(
            x,
            scores,
            self.gate_up,
            self.down,
            self.experts,
            config.activation,
            self.preference,
            self.factors,
        )
        if self.adds_parts:
            parts = ops.all_reduce(parts)
        x = ops.sum_parts(parts, self.experts.places)
        return ops.all_reduce(x) if self.adds_sums else x


def load_block(
    load: WeightLoader, config: ModelConfig, layer: int
) -> GatedFeedForward | ExpertsFeedForward:
    """The feed-forward layer number `layer`, of experts where the configuration says so."""
    if layer in config.expert_layers:
        return load_experts(load, config, layer)
    return load_feed_forward(load, config, layer)


def load_experts(load: WeightLoader, config: ModelConfig, layer: int) -> ExpertsFeedForward:
    """The router and this rank's experts of one layer."""
    assert config.experts is not None
    count, wide, hidden = config.experts.count, config.experts.width, config.hidden
    for name, width in (("the experts' intermediate size", wide), ("hidden_size", hidden)):
        if width % WIDTH_UNIT:
            raise ConfigError(f"{name} is {width}; experts take multiples of {WIDTH_UNIT}")
    block, (gate, up, down) = f"model.layers.{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
    mixtral = f"model.layers.{layer}.block_sparse_moe"
    if any(load.has(f"{mixtral}.{tensor}.weight") for tensor in ("gate", "experts.0.w1")):
        block, (gate, up, down) = mixtral, ("w1", "w3", "w2")
    router = f"{block}.router" if load.has(f"{block}.router.weight") else f"{block}.gate"
    given = config.experts
    names = [f"{block}.experts.{number}" for number in range(count)]
    # One for all shared ones, or one with a gate.
    shared = f"{block}.shared_expert{'' if given.gated else 's'}"
    gates = (f"{block}.shared_expert_gate", given.shared) if given.gated else None
    own = load.spans(count + given.shared, "the number of experts")[load.shard.rank]
    preferences = (f"{block}.gate.e_score_correction_bias", f"{block}.{ERNIE_PREFERENCE}")
    preferred = next((name for name in preferences if load.has(name)), preferences[0])
    # Some of ERNIE's and LFM2's files have none.
    unsure = config.model_type in ("ernie4_5_moe", "lfm2_moe")
    prefers = given.preferred and (load.has(preferred) or not unsure)
    several, factors = load.shard.ranks > 1, f"{block}.gate.per_expert_scale"
    return ExpertsFeedForward(
        load.router(router, count, hidden, gates),
        load.experts(
            [[f"{name}.{gate}", f"{name}.{up}"] for name in names],
            wide,
            hidden,
            own,
            [f"{shared}.{gate}", f"{shared}.{up}"],
            (0, given.shared),
        ),
        load.experts(
            [[f"{name}.{down}"] for name in names],
            hidden,
            wide,
            own,
            [f"{shared}.{down}"],
            (1, given.shared),
        ),
        load.per_expert(preferred, count) if prefers else None,
        load.per_expert(factors, count) if load.has(factors) else None,
        Experts(
            count,
            given.used,
            given.normalized,
            own.start,
            own.length,
            given.sigmoid,
            given.scale,
            given.shared,
            given.gated,
            given.groups,
            given.kept,
        ),
        adds_parts=several and load.exact,
        adds_sums=several and not load.exact,
    )
