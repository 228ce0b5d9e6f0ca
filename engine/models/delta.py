"""Gated delta nets (arXiv 2412.06464), the layers of Qwen3-Next and Qwen 3.5 that keep a state of
one size instead of keys and values.

Ranks share out key heads, with the value heads that go with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.loader import Norm, OutputProjection, WeightLoader, numbers
from engine.models.shard import Span
from kernels.ops import DeltaHeads, Ops, T, Weight

# How wide heads are in multiples of, for the CPU kernels.
DIM_UNIT = 16


@dataclass(frozen=True)
class DeltaNet:
    """Delta layer `number`; `heads` are this rank's."""

    number: int
    heads: DeltaHeads
    qkv: Weight
    z: Weight
    gates: Weight
    taps: Weight
    decay: Weight
    offset: Weight
    norm: Norm
    output: OutputProjection

    def forward(
        self, ops: Ops[T], x: T, residual: T, config: ModelConfig, *, last: bool
    ) -> tuple[T, T]:
        """`[tokens, hidden] -> [rows, hidden]`, and those rows of the residual, as `Attention`."""
        qkv, z, gates = (ops.linear(x, weight) for weight in (self.qkv, self.z, self.gates))
        y = ops.delta(qkv, gates, self.number, self.heads, self.taps, self.decay, self.offset)
        y = ops.gated_norm(y, z, self.norm.weight, self.norm.eps)
        if last:
            y, residual = ops.select_rows(y), ops.select_rows(residual)
        return self.output.forward(ops, y), residual


def load_delta(load: WeightLoader, config: ModelConfig, layer: int) -> DeltaNet:
    """The delta net of one layer."""
    assert config.delta is not None
    heads, shard = config.delta, load.shard
    _check(heads, shard.ranks)
    name, hidden = f"model.layers.{layer}.linear_attn", config.hidden
    spans = load.spans(heads.key, "linear_num_key_heads")
    own, share = spans[shard.rank], heads.value // heads.key
    mine = own.times(share)
    wide, values = 2 * heads.key * heads.key_dim, heads.value * heads.value_dim
    channels = torch.cat(_channels(heads, own))
    qkv = (f"{name}.in_proj_qkv", wide + values, channels)
    z = (f"{name}.in_proj_z", values, numbers(mine.times(heads.value_dim)))
    of_heads = numbers(mine)
    gates = [(f"{name}.in_proj_{gate}", heads.value, of_heads) for gate in "ba"]
    if load.has(f"{name}.in_proj_qkvz.weight"):
        mixed, rows = (f"{name}.in_proj_qkvz", wide + 2 * values), _mixed(heads, own)
        qkv, z = (*mixed, torch.cat(rows[:3])), (*mixed, rows[3])
    if load.has(f"{name}.in_proj_ba.weight"):
        gates = [(f"{name}.in_proj_ba", 2 * heads.value, _mixed_gates(heads, own))]
    inputs = [span.times(share * heads.value_dim) for span in spans]
    negative = load.checkpoint.norms_include_one  # converted files hold -exp(A_log)
    return DeltaNet(
        config.delta_layers.index(layer),
        shard.own_delta(heads),
        load.picked([qkv], hidden),
        load.picked([z], hidden),
        # What decides how long something is remembered is rounded no further than to bfloat16.
        load.picked(gates, hidden, bits=16),
        load.taps(f"{name}.conv1d", wide + values, heads.taps, channels),
        load.computed(
            f"{name}.A_log",
            (heads.value,),
            lambda a: (-a if negative else a.exp())[of_heads],
            mine.length,
        ),
        load.computed(
            f"{name}.dt_bias",
            (heads.value,),
            lambda a: a[of_heads],
            mine.length,
        ),
        Norm(load.vector(f"{name}.norm.weight", heads.value_dim, centred=False), config.norm_eps),
        load.output(f"{name}.out_proj", hidden, values, inputs, None),
    )


def _check(heads: DeltaHeads, ranks: int) -> None:
    for name, dim in (("key", heads.key_dim), ("value", heads.value_dim)):
        if dim % DIM_UNIT:
            raise ConfigError(
                f"linear_{name}_head_dim is {dim}; delta nets take multiples of {DIM_UNIT}"
            )
    if heads.tiled and ranks > 1 and heads.value != heads.key:
        raise ConfigError(
            "the file has value heads in ggml's order, which several ranks cannot share out; use "
            "the model's safetensors, or one rank"
        )


def _channels(heads: DeltaHeads, own: Span) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a rank's queries, keys and values, which lie behind each other."""
    keys, share = heads.key * heads.key_dim, heads.value // heads.key
    q = numbers(own.times(heads.key_dim))
    return q, keys + q, 2 * keys + numbers(own.times(share * heads.value_dim))


def _mixed(heads: DeltaHeads, own: Span) -> list[torch.Tensor]:
    """Rows of queries, keys, values and z where all that goes with a key head lies together."""
    share = heads.value // heads.key
    sizes = [heads.key_dim, heads.key_dim, *[share * heads.value_dim] * 2]
    blocks = torch.arange(heads.key * sum(sizes)).view(heads.key, -1)
    parts = torch.split(blocks[own.start : own.start + own.length], sizes, dim=1)
    return [part.flatten() for part in parts]


def _mixed_gates(heads: DeltaHeads, own: Span) -> torch.Tensor:
    """Rows of b, then of a, where a key head's lie together."""
    pairs = torch.arange(2 * heads.value).view(heads.key, 2, -1)
    return pairs[own.start : own.start + own.length].transpose(0, 1).flatten()
