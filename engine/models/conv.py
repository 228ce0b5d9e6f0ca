"""Gated short convolutions, the layers of Liquid AI's LFM2 that keep a few inputs of every channel
instead of keys and values. Ranks share out channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.models.config import ModelConfig
from engine.models.loader import OutputProjection, WeightLoader, numbers
from kernels.ops import DeltaHeads, Ops, T, Weight


@dataclass(frozen=True)
class ShortConv:
    """Layer `number` of those that keep a state; `heads` are this rank's channels."""

    number: int
    heads: DeltaHeads
    input: Weight
    taps: Weight
    output: OutputProjection

    def forward(
        self, ops: Ops[T], x: T, residual: T, config: ModelConfig, *, last: bool
    ) -> tuple[T, T]:
        """`[tokens, hidden] -> [rows, hidden]`, and those rows of the residual, as `Attention`."""
        y = ops.short_conv(ops.linear(x, self.input), self.number, self.heads, self.taps)
        if last:
            y, residual = ops.select_rows(y), ops.select_rows(residual)
        return self.output.forward(ops, y), residual


def load_conv(load: WeightLoader, config: ModelConfig, layer: int) -> ShortConv:
    """The short convolution of one layer."""
    assert config.delta is not None
    heads, shard, hidden = config.delta, load.shard, config.hidden
    name, width = f"model.layers.{layer}.conv", heads.width
    spans = [s.times(heads.value_dim) for s in load.spans(heads.value, "hidden_size")]
    own = spans[shard.rank]
    channels = numbers(own)
    rows = torch.cat([channels + third * width for third in range(3)])
    return ShortConv(
        config.delta_layers.index(layer),
        shard.own_delta(heads),
        load.picked([(f"{name}.in_proj", 3 * width, rows)], hidden),
        load.taps(f"{name}.conv", width, heads.taps, channels),
        load.output(f"{name}.out_proj", hidden, width, spans, None),
    )
