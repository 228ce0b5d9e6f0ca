"""Gemma 4: norms on both sides of each block, heads that differ between layers, layers that read
the keys and values of others, and in the smaller models a vector for each token and layer, which
stands in a table beside the embedding's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.models.config import ModelConfig
from engine.models.experts import ExpertsFeedForward, load_experts
from engine.models.gemma4_config import LayerInputs
from engine.models.layers import (
    Attention,
    GatedFeedForward,
    load_attention,
    load_feed_forward,
    load_head,
    own_heads,
)
from engine.models.loader import Norm, Vocabulary, WeightLoader
from engine.models.sandwich import GEMMA_NORMS
from engine.models.shard import Span
from kernels.ops import DeltaHeads, Ops, T, Weight


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


@dataclass(frozen=True)
class Layer:
    """One transformer layer; `scale` is the whole residual's behind it."""

    before_attention: Weight
    attention: Attention
    after_attention: Weight
    before_feed_forward: Weight
    feed_forward: GatedFeedForward
    experts: ExpertsBeside | None
    after_feed_forward: Weight
    input: LayerInput | None
    scale: float


class Gemma4:
    """A decoder-only transformer for text."""

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.heads = own_heads(load, config)
        self.delta: DeltaHeads | None = None
        hidden = config.hidden
        self.embedding = load.vocabulary("model.embed_tokens.weight", config.vocab_size, hidden)
        self.vectors = _load_vectors(load, config) if config.inputs is not None else None
        self.layers = [_load_layer(load, config, n) for n in range(config.layers)]
        self.norm = load.vector("model.norm.weight", hidden)
        self.head = load_head(load, config, self.embedding)
        # Some files have projections of layers that make no keys.
        shared = [n for n, source in enumerate(config.each.keys_of) if n != source]
        names = [f"model.layers.{n}.self_attn.{part}" for n in shared for part in "kv"]
        load.finish(tied=config.tied_embeddings, unread=tuple(f"{name}_" for name in names))

    def forward(self, ops: Ops[T]) -> T:
        """Logits of the step's sampled rows, `[samples, vocab]`."""
        config, eps = self.config, self.config.norm_eps
        residual = self.embedding.embed(ops, config.embedding_scale)
        vectors = self.vectors.forward(ops, residual) if self.vectors is not None else None
        x = ops.rms_norm(residual, self.layers[0].before_attention, eps)
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            last = following is None
            x, residual = layer.attention.forward(ops, x, residual, config, last=last)
            x = ops.rms_norm(x, layer.after_attention, eps)
            x, residual = ops.add_rms_norm(x, residual, layer.before_feed_forward, eps)
            x = layer.feed_forward.forward(ops, x, config)
            if layer.experts is not None:
                x = layer.experts.forward(ops, x, residual, config)
            x = ops.rms_norm(x, layer.after_feed_forward, eps)
            if layer.input is not None:
                assert vectors is not None
                if last:
                    vectors = ops.select_rows(vectors)
                residual = ops.add(x, residual)
                x = layer.input.forward(ops, residual, vectors)
            norm = following.before_attention if following is not None else self.norm
            x, residual = ops.add_rms_norm(x, residual, norm, eps, layer.scale)
        logits = self.head.logits(ops, x)
        return ops.softcap(logits, config.logits_cap) if config.logits_cap else logits


def _load_vectors(load: WeightLoader, config: ModelConfig) -> LayerVectors:
    inputs, hidden = config.inputs, config.hidden
    assert inputs is not None
    wide = config.layers * inputs.width
    # Both parts are divided by sqrt(2); what the projection is divided by, its norm undoes.
    share = math.sqrt(0.5)
    table = load.vocabulary("model.embed_tokens_per_layer.weight", inputs.rows, wide)
    projection = _whole(load, "model.per_layer_model_projection", wide, hidden)
    norm = load.vector("model.per_layer_projection_norm.weight", inputs.width, factor=share)
    scale = math.sqrt(inputs.width) * share
    return LayerVectors(table, projection, Norm(norm, config.norm_eps * hidden), scale)


def _load_layer(load: WeightLoader, config: ModelConfig, layer: int) -> Layer:
    name, hidden = f"model.layers.{layer}", config.hidden
    norms = [load.vector(f"{name}.{norm}.weight", hidden) for norm in GEMMA_NORMS]
    scale = f"{name}.layer_scalar"
    return Layer(
        norms[0],
        load_attention(load, config, layer),
        norms[1],
        norms[2],
        load_feed_forward(load, config, layer),
        _load_experts(load, config, layer) if config.experts is not None else None,
        norms[3],
        _load_input(load, config, layer, config.inputs) if config.inputs is not None else None,
        load.number(scale) if load.has(scale) else 1.0,
    )


def _load_experts(load: WeightLoader, config: ModelConfig, layer: int) -> ExpertsBeside:
    name, hidden = f"model.layers.{layer}", config.hidden
    norms = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm")
    return ExpertsBeside(
        load_experts(load, config, layer),
        load.vector(f"{name}.{norms[0]}.weight", hidden),
        load.vector(f"{name}.mlp.gate.scale", hidden, factor=hidden**-0.5),
        load.vector(f"{name}.{norms[1]}_2.weight", hidden),
        load.vector(f"{name}.{norms[1]}_1.weight", hidden),
    )


def _load_input(
    load: WeightLoader, config: ModelConfig, layer: int, inputs: LayerInputs
) -> LayerInput:
    name, hidden, width = f"model.layers.{layer}", config.hidden, inputs.width
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
