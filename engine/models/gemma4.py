"""What the layers of Gemma 4 have besides those of Gemma 3: in the smaller models a vector for each
token and layer, which stands in a table beside the embedding's, in others experts beside each
feed-forward block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.models.config import ModelConfig
from engine.models.experts import ExpertsFeedForward, load_experts
from engine.models.loader import Norm, Vocabulary, WeightLoader
from engine.models.shard import Span
from kernels.ops import Ops, T, Weight


@dataclass(frozen=True)
class LayerVectors:
    """The table of every token's vectors, all layers side by side, and what is made of its
    embedding to be added."""

    table: Vocabulary
    projection: Weight
    norm: Norm
    scale: float

    def forward(self, ops: Ops[T], embedded: T) -> T:
        """`[tokens, layers * width]` of embedded tokens `[tokens, hidden]`."""
        made = ops.rms_norm(ops.linear(embedded, self.projection), self.norm.weight, self.norm.eps)
        return ops.add(made, self.table.embed(ops, self.scale))


@dataclass(frozen=True)
class LayerInput:
    """What a layer does with its vector: gated by the residual, projected, and normalized."""

    gate: Weight
    projection: Weight
    norm: Norm
    first: int

    def forward(self, ops: Ops[T], x: T, vectors: T) -> T:
        """`[rows, hidden] -> [rows, hidden]`."""
        x = ops.gate(vectors, ops.linear(x, self.gate), "gelu_tanh", self.first)
        return ops.rms_norm(ops.linear(x, self.projection), self.norm.weight, self.norm.eps)


@dataclass(frozen=True)
class ExpertsBeside:
    """Experts beside a feed-forward block, whose answers are added; each has norms of its own."""

    block: ExpertsFeedForward
    before: Weight
    routing: Weight
    after: Weight
    after_dense: Weight

    def forward(self, ops: Ops[T], dense: T, residual: T, config: ModelConfig) -> T:
        """What both say, `[rows, hidden]`: `dense` is what the feed-forward block does."""
        x = ops.rms_norm(residual, self.before, config.norm_eps)
        routed = ops.rms_norm(residual, self.routing, config.norm_eps)
        x = self.block.forward(ops, x, config, routed)
        x = ops.rms_norm(x, self.after, config.norm_eps)
        return ops.add(ops.rms_norm(dense, self.after_dense, config.norm_eps), x)


def load_vectors(load: WeightLoader, config: ModelConfig) -> LayerVectors | None:
    """The table, and what is made of embeddings; None of models without."""
    inputs, hidden = config.inputs, config.hidden
    if inputs is None:
        return None
    wide = config.layers * inputs.width
    # Both parts are divided by sqrt(2); what the projection is divided by, its norm undoes.
    share = math.sqrt(0.5)
    table = load.vocabulary("model.embed_tokens_per_layer.weight", inputs.rows, wide)
    projection = _whole(load, "model.per_layer_model_projection", wide, hidden)
    norm = load.vector("model.per_layer_projection_norm.weight", inputs.width, factor=share)
    scale = math.sqrt(inputs.width) * share
    return LayerVectors(table, projection, Norm(norm, config.norm_eps * hidden), scale)


def load_experts_beside(
    load: WeightLoader, config: ModelConfig, layer: int
) -> ExpertsBeside | None:
    """Those of one layer; None of models without."""
    if config.experts is None:
        return None
    name, hidden = f"model.layers.{layer}", config.hidden
    norms = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm")
    return ExpertsBeside(
        load_experts(load, config, layer),
        load.vector(f"{name}.{norms[0]}.weight", hidden),
        load.vector(f"{name}.mlp.gate.scale", hidden, factor=hidden**-0.5),
        load.vector(f"{name}.{norms[1]}_2.weight", hidden),
        load.vector(f"{name}.{norms[1]}_1.weight", hidden),
    )


def load_input(load: WeightLoader, config: ModelConfig, layer: int) -> LayerInput | None:
    """What one layer does with its vector; None of models without."""
    if config.inputs is None:
        return None
    name, hidden, width = f"model.layers.{layer}", config.hidden, config.inputs.width
    norm = load.vector(f"{name}.post_per_layer_input_norm.weight", hidden)
    return LayerInput(
        _whole(load, f"{name}.per_layer_input_gate", width, hidden),
        _whole(load, f"{name}.per_layer_projection", hidden, width),
        Norm(norm, config.norm_eps),
        layer * width,
    )


def _whole(load: WeightLoader, name: str, rows: int, columns: int) -> Weight:
    """A linear that every rank has."""
    return load.linear([name], [rows], columns, [Span(0, rows)])
