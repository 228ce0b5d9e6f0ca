"""What model families share: attention and feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.models.config import ModelConfig
from engine.models.loader import Norm, OutputProjection, Vocabulary, WeightLoader, numbers
from engine.models.shard import HeadSpan, Span
from kernels.ops import HeadNorms, Heads, Ops, T, Weight


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv 2305.13245) over the paged cache; `heads` are this rank's. Its
    keys and values are the cache's layer `place`, which it `writes` or leaves to another layer;
    `gate` makes what its outputs are multiplied by the sigmoid of. Norms over the heads of all
    ranks gather squares of the widths `squares`, among which this rank `counts` its keys."""

    layer: int
    place: int
    heads: Heads
    qkv: Weight
    norms: HeadNorms | None
    sinks: Weight | None
    gate: Weight | None
    output: OutputProjection
    writes: bool = True
    squares: tuple[int, ...] = ()
    counts: bool = True

    def forward(
        self, ops: Ops[T], x: T, residual: T, config: ModelConfig, *, last: bool
    ) -> tuple[T, T]:
        """`[tokens, hidden] -> [rows, hidden]`, and those rows of the residual: all of them, or in
        the last layer, behind whose keys and values nobody asks for others, the step's sampled
        rows. Writes this layer's keys and values."""
        rope, window = config.ropes[self.layer], config.windows[self.layer]
        gate = ops.linear(x, self.gate) if self.gate is not None else None
        qkv = ops.linear(x, self.qkv)
        made = self.heads if self.writes else replace(self.heads, kv=0)
        squares = None
        if self.norms is not None and self.norms.whole is not None:
            squares = ops.head_squares(qkv, made, self.counts)
            squares = ops.all_gather(squares, self.squares) if self.squares else squares
        q = ops.rope_write_kv(qkv, self.place, made, rope, self.norms, squares)
        scale = config.attention_scale
        x = ops.attention(q, self.place, self.heads, scale, window, self.sinks)
        if gate is not None:
            x = ops.gate(x, gate, "sigmoid")
        if last:
            x, residual = ops.select_rows(x), ops.select_rows(residual)
        return self.output.forward(ops, x), residual


@dataclass(frozen=True)
class GatedFeedForward:
    """A gated feed-forward block (arXiv 2002.05202)."""

    gate_up: Weight
    down: OutputProjection

    def forward(self, ops: Ops[T], x: T, config: ModelConfig) -> T:
        """`[rows, hidden] -> [rows, hidden]`."""
        return self.down.forward(ops, ops.gated(ops.linear(x, self.gate_up), config.activation))


def own_heads(load: WeightLoader, config: ModelConfig) -> tuple[Heads, ...]:
    """This rank's of each layer that keeps keys and values."""
    return tuple(load.shard.own_heads(config.each.heads[n]) for n in config.cached_layers)


def load_attention(load: WeightLoader, config: ModelConfig, layer: int) -> Attention:
    """The attention block of one layer, its three input projections stacked into one."""
    name = f"model.layers.{layer}.self_attn"
    heads, source = config.each.heads[layer], config.each.keys_of[layer]
    q, kv = heads.query * heads.dim, heads.kv * heads.dim
    order = rotated_apart(heads.dim, config.rotated[layer], neighbours=config.neighbours)
    writes = source == layer
    inner = None
    if config.inner_norms:
        inner = Norm(load.vector(f"{name}.attn_sub_norm.weight", q), config.norm_eps)
    spans = load.shard.head_spans(heads)
    own = spans[load.shard.rank]
    norms = _head_norms(load, config, name, heads, own, order, writes=writes)
    rows = [own.query.times(heads.dim), *[own.kv.times(heads.dim)] * 2]
    inputs = [span.query.times(heads.dim) for span in spans]
    gate = None
    if config.gated_attention:
        qkv, gate = _gated_inputs(load, config, name, own, order)
    else:
        values = "k" if layer in config.each.doubling else "v"
        count = 3 if writes else 1
        qkv = load.linear(
            [f"{name}.{p}_proj" for p in ("q", "k", values)[:count]],
            [q, kv, kv][:count],
            config.hidden,
            rows[:count],
            [_of_heads(order, heads.query), _of_heads(order, heads.kv), None][:count],
        )
    return Attention(
        layer,
        config.cached_layers.index(source),
        own.of(heads),
        qkv,
        norms,
        load.part(f"{name}.sinks", heads.query, own.query) if config.sinks else None,
        gate,
        load.output(f"{name}.o_proj", config.hidden, q, inputs, inner),
        writes,
        tuple(2 * span.query.length for span in spans) if len(spans) > 1 else (),
        # Where ranks share a key head, the one with its first query head.
        own.query.start % (heads.query // heads.kv) == 0,
    )


def _head_norms(
    load: WeightLoader,
    config: ModelConfig,
    name: str,
    heads: Heads,
    own: HeadSpan,
    order: torch.Tensor | None,
    *,
    writes: bool,
) -> HeadNorms | None:
    """Those of queries, and of keys and values where the layer `writes` some."""
    if not config.head_norms:
        return None
    dim = heads.dim
    if config.whole_norms:
        query = load.part(f"{name}.q_norm.weight", heads.query * dim, own.query.times(dim))
        key = load.part(f"{name}.k_norm.weight", heads.kv * dim, own.kv.times(dim))
        return HeadNorms(query, key, config.norm_eps, whole=heads)
    query = load.vector(f"{name}.q_norm.weight", dim, order=order)
    if not writes:
        return HeadNorms(query, query, config.norm_eps)
    key = load.vector(f"{name}.k_norm.weight", dim, order=order)
    value = None
    if config.value_norms:
        value = load.computed(f"{name}.k_norm.weight", (dim,), torch.ones_like, dim)
    return HeadNorms(query, key, config.norm_eps, value)


def _gated_inputs(
    load: WeightLoader,
    config: ModelConfig,
    name: str,
    own: HeadSpan,
    order: torch.Tensor | None,
) -> tuple[Weight, Weight]:
    """The input projections of attention whose outputs are gated, and the gates', which lie behind
    each head's queries."""
    heads, dim, hidden = config.heads, config.heads.dim, config.hidden
    straight = torch.arange(dim)
    turned = straight if order is None else order

    def rows(span: Span, size: int, within: torch.Tensor) -> torch.Tensor:
        return (numbers(span)[:, None] * size + within).flatten()

    q, kv = heads.query * dim, heads.kv * dim
    queries = (f"{name}.q_proj", 2 * q)
    qkv = [
        (*queries, rows(own.query, 2 * dim, turned)),
        (f"{name}.k_proj", kv, rows(own.kv, dim, turned)),
        (f"{name}.v_proj", kv, rows(own.kv, dim, straight)),
    ]
    gate = [(*queries, rows(own.query, 2 * dim, dim + straight))]
    return load.picked(qkv, hidden), load.picked(gate, hidden)


def rotated_apart(dim: int, rotated: int, *, neighbours: bool) -> torch.Tensor | None:
    """Where a head's values go so that those that rotate together are half a head apart, though
    only the first `rotated` of them do, or they are neighbours. Scores do not depend on it."""
    if rotated == dim and not neighbours:
        return None
    pairs = torch.arange(rotated)
    low, high = pairs.view(-1, 2).t() if neighbours else pairs.view(2, -1)
    rest = torch.arange(rotated, dim).view(2, -1)
    return torch.cat((low, rest[0], high, rest[1]))


def _of_heads(order: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """The order of all heads' rows, each head's as given."""
    if order is None:
        return None
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


def load_feed_forward(load: WeightLoader, config: ModelConfig, layer: int) -> GatedFeedForward:
    """The feed-forward block of one layer, gate and up projections stacked into one."""
    name = f"model.layers.{layer}.mlp"
    wide = config.each.intermediate[layer]
    inner = None
    if config.inner_norms:
        inner = Norm(load.vector(f"{name}.ffn_sub_norm.weight", wide), config.norm_eps)
    spans = load.spans(wide, "intermediate_size", load.column_unit(f"{name}.down_proj"))
    rows = [spans[load.shard.rank]] * 2
    gate_up = [f"{name}.gate_proj", f"{name}.up_proj"]
    return GatedFeedForward(
        load.linear(gate_up, [wide, wide], config.hidden, rows),
        load.output(f"{name}.down_proj", config.hidden, wide, spans, inner),
    )


def load_head(load: WeightLoader, config: ModelConfig, embedding: Vocabulary) -> Vocabulary:
    """The output head: a matrix of its own, or the embedding table again."""
    if config.tied_embeddings:
        return embedding
    return load.vocabulary("lm_head.weight", config.vocab_size, config.hidden)
