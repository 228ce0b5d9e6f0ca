"""Models with norms before and after each block: Gemma 3 (arXiv 2503.19786), five of whose six
layers slide, and GLM-4."""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.config import ModelConfig
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
    """One transformer layer with norms on both sides of each block."""

    before_attention: Weight
    attention: Attention
    after_attention: Weight
    before_feed_forward: Weight
    feed_forward: GatedFeedForward
    after_feed_forward: Weight


class Sandwich:
    """A decoder-only transformer whose blocks stand between two norms each."""

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.heads = own_heads(load, config)
        self.delta: DeltaHeads | None = None
        hidden = config.hidden
        self.embedding = load.vocabulary("model.embed_tokens.weight", config.vocab_size, hidden)
        names = GLM_NORMS if config.model_type == "glm4" else GEMMA_NORMS
        self.layers = []
        for n in range(config.layers):
            norms = [load.vector(f"model.layers.{n}.{name}.weight", hidden) for name in names]
            attention, block = load_attention(load, config, n), load_feed_forward(load, config, n)
            self.layers.append(Layer(norms[0], attention, norms[1], norms[2], block, norms[3]))
        self.norm = load.vector("model.norm.weight", hidden)
        self.head = load_head(load, config, self.embedding)
        load.finish(tied=config.tied_embeddings)

    def forward(self, ops: Ops[T]) -> T:
        """Logits of the step's sampled rows, `[samples, vocab]`."""
        config, eps = self.config, self.config.norm_eps
        residual = self.embedding.embed(ops, config.embedding_scale)
        x = ops.rms_norm(residual, self.layers[0].before_attention, eps)
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            last = following is None
            x, residual = layer.attention.forward(ops, x, residual, config, last=last)
            x = ops.rms_norm(x, layer.after_attention, eps)
            x, residual = ops.add_rms_norm(x, residual, layer.before_feed_forward, eps)
            x = layer.feed_forward.forward(ops, x, config)
            x = ops.rms_norm(x, layer.after_feed_forward, eps)
            if following is not None:
                x, residual = ops.add_rms_norm(x, residual, following.before_attention, eps)
        x, _ = ops.add_rms_norm(x, residual, self.norm, eps)
        return self.head.logits(ops, x)
