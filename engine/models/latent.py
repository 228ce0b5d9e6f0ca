"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

A token leaves one latent vector in the cache, of which every head's key and value are projections.
These are taken over by their neighbours: what would make keys of latents makes the queries' part of
scores instead, and what would make values of them is applied to what attention mixes. So all heads
attend to one vector a token, as if they shared one key and value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from engine.models.config import ModelConfig
from engine.models.latent_config import LatentConfig
from engine.models.layers import rotated_apart
from engine.models.loader import OutputProjection, WeightLoader, numbers
from engine.models.shard import Span
from engine.weights.views import Reordered, Turned
from kernels.backend import HostTensor
from kernels.ops import LatentHeads, Ops, T, Weight

# Of the norms within attention, whatever the others have.
EPS = 1e-6


@dataclass(frozen=True)
class LatentAttention:
    """Attention over the cache's layer `place` by this rank's `heads`. Queries come from the
    layer's input, or from a `query_norm` of what `narrowing` makes of it; `keys` are `[query *
    rank, plain]`, `values` `[query * value, rank]`."""

    layer: int
    place: int
    heads: LatentHeads
    narrowing: Weight | None
    query_norm: Weight | None
    query: Weight
    latent: Weight
    norm: Weight
    keys: Weight
    values: Weight
    output: OutputProjection

    def forward(
        self, ops: Ops[T], x: T, residual: T, config: ModelConfig, *, last: bool
    ) -> tuple[T, T]:
        """As `Attention`'s."""
        heads, rope = self.heads, config.ropes[self.layer]
        kv = ops.linear(x, self.latent)
        if self.narrowing is not None and self.query_norm is not None:
            x = ops.rms_norm(ops.linear(x, self.narrowing), self.query_norm, EPS)
        q = ops.linear(x, self.query)
        absorbed = ops.head_linear(q, self.keys, heads.query)
        q = ops.write_latent(absorbed, q, kv, self.place, heads, rope, self.norm, EPS)
        x = ops.attention(q, self.place, heads.cached, config.attention_scale, 0)
        if last:
            x, residual = ops.select_rows(x), ops.select_rows(residual)
        x = ops.head_linear(x, self.values, heads.query)
        return self.output.forward(ops, x), residual


def load_latent(load: WeightLoader, config: ModelConfig, layer: int) -> LatentAttention:
    """The attention block of one layer; ranks share out its heads, and all have the latents."""
    assert config.latent is not None
    name, given, hidden = f"model.layers.{layer}.self_attn", config.latent, config.hidden
    heads, rank = given.heads, given.heads.rank
    spans = [span.query for span in load.shard.head_spans(heads.cached)]
    own = spans[load.shard.rank]
    turned = rotated_apart(heads.turned, heads.turned, neighbours=config.neighbours)
    straight = torch.arange(heads.turned) if turned is None else turned
    in_head = torch.cat((torch.arange(heads.plain), heads.plain + straight))
    of_heads = (torch.arange(heads.query)[:, None] * len(in_head) + in_head).flatten()
    narrowing = query_norm = None
    query, columns = f"{name}.q_proj", hidden
    if given.query_rank:
        query, columns = f"{name}.q_b_proj", given.query_rank
        whole = [Span(0, columns)]
        narrowing = load.linear([f"{name}.q_a_proj"], [columns], hidden, whole)
        query_norm = load.vector(f"{name}.q_a_layernorm.weight", columns)
    width, kept = heads.query_width, heads.cached.dim
    keys, values = _absorbed(load, name, given, own)
    return LatentAttention(
        layer,
        config.cached_layers.index(layer),
        replace(heads, query=own.length),
        narrowing,
        query_norm,
        load.linear([query], [width], columns, [own.times(len(in_head))], [of_heads]),
        load.linear(
            [f"{name}.kv_a_proj_with_mqa"],
            [kept],
            hidden,
            [Span(0, kept)],
            [torch.cat((torch.arange(rank), rank + straight))],
        ),
        load.vector(f"{name}.kv_a_layernorm.weight", rank),
        keys,
        values,
        load.output(
            f"{name}.o_proj",
            hidden,
            heads.query * given.value,
            [span.times(given.value) for span in spans],
            None,
        ),
    )


def _absorbed(
    load: WeightLoader, name: str, given: LatentConfig, own: Span
) -> tuple[Weight, Weight]:
    """The projections of latents to keys, turned about, and to values: apart (ggml), or in each
    head's rows of one matrix."""
    heads, rank = given.heads, given.heads.rank

    def mine(rows: int, tensor: HostTensor) -> HostTensor:
        span = own.times(rows)
        return tensor.narrow(0, span.start, span.length)

    if load.has(f"{name}.k_b_proj.weight"):
        query = heads.query
        return (
            load.seen(f"{name}.k_b_proj.weight", (query * rank, heads.plain), partial(mine, rank)),
            load.seen(
                f"{name}.v_b_proj.weight", (query * given.value, rank), partial(mine, given.value)
            ),
        )
    both = heads.plain + given.value

    def rows(first: int, count: int, tensor: HostTensor) -> HostTensor:
        starts = numbers(own)[:, None] * both + first
        return Reordered(tensor, (starts + torch.arange(count)).flatten())

    def turned(tensor: HostTensor) -> HostTensor:
        return Turned(rows(0, heads.plain, tensor), own.length)

    matrix, shape = f"{name}.kv_b_proj.weight", (heads.query * both, rank)
    keys = load.seen(matrix, shape, turned)
    return keys, load.seen(matrix, shape, partial(rows, heads.plain, given.value))
