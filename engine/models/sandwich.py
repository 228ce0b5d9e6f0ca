"""Models with norms before and after each block: Gemma 3 (arXiv 2503.19786), five of whose six
layers slide, Gemma 4, whose heads differ between layers and whose last layers may read the keys and
values of others, and GLM-4."""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.config import ModelConfig
from engine.models.gemma4 import (
    ExpertsBeside,
    LayerInput,
    load_experts_beside,
    load_input,
    load_vectors,
)
from engine.models.layers import (
    Attention,
    GatedFeedForward,
    load_attention,
    load_feed_forward,
    load_head,
    own_heads,
)
from engine.models.loader import WeightLoader
from kernels.ops import DeltaHeads, Ops, T, Weight

# What a layer's norms are called: before and after attention, then the feed-forward part.
GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
GLM_NORMS = (
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)


@dataclass(frozen=True)
class Layer:
    """One transformer layer with norms on both sides of each block; `scale` is the whole residual's
    behind it."""

    before_attention: Weight
    attention: Attention
    after_attention: Weight
    before_feed_forward: Weight
    feed_forward: GatedFeedForward
    experts: ExpertsBeside | None
    after_feed_forward: Weight
    input: LayerInput | None
    scale: float


class Sandwich:
    """A decoder-only transformer whose blocks stand between two norms each."""

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.heads = own_heads(load, config)
        self.delta: DeltaHeads | None = None
        hidden = config.hidden
        self.embedding = load.vocabulary("model.embed_tokens.weight", config.vocab_size, hidden)
        self.vectors = load_vectors(load, config)
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


def _load_layer(load: WeightLoader, config: ModelConfig, layer: int) -> Layer:
    names = GLM_NORMS if config.model_type == "glm4" else GEMMA_NORMS
    name = f"model.layers.{layer}"
    norms = [load.vector(f"{name}.{norm}.weight", config.hidden) for norm in names]
    scale = f"{name}.layer_scalar"
    return Layer(
        norms[0],
        load_attention(load, config, layer),
        norms[1],
        norms[2],
        load_feed_forward(load, config, layer),
        load_experts_beside(load, config, layer),
        norms[3],
        load_input(load, config, layer),
        load.number(scale) if load.has(scale) else 1.0,
    )
