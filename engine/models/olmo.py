"""OLMo 2 (arXiv 2501.00656) and OLMo 3, three of whose four layers slide: norms stand behind each
block, before the residual's addition, and none before it."""

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


@dataclass(frozen=True)
class Layer:
    """One post-norm transformer layer."""

    attention: Attention
    after_attention: Weight
    feed_forward: GatedFeedForward
    after_feed_forward: Weight


class Olmo:
    """A decoder-only transformer whose blocks read the residual as it is."""

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.heads = own_heads(load, config)
        self.delta: DeltaHeads | None = None
        hidden = config.hidden
        self.embedding = load.vocabulary("model.embed_tokens.weight", config.vocab_size, hidden)
        self.layers = [
            Layer(
                load_attention(load, config, n),
                load.vector(f"model.layers.{n}.post_attention_layernorm.weight", hidden),
                load_feed_forward(load, config, n),
                load.vector(f"model.layers.{n}.post_feedforward_layernorm.weight", hidden),
            )
            for n in range(config.layers)
        ]
        self.norm = load.vector("model.norm.weight", hidden)
        self.head = load_head(load, config, self.embedding)
        load.finish(tied=config.tied_embeddings)

    def forward(self, ops: Ops[T]) -> T:
        """Logits of the step's sampled rows, `[samples, vocab]`."""
        config, eps = self.config, self.config.norm_eps
        x = self.embedding.embed(ops, config.embedding_scale)
        for layer in self.layers:
            y, x = layer.attention.forward(ops, x, x, config, last=layer is self.layers[-1])
            x = ops.add(ops.rms_norm(y, layer.after_attention, eps), x)
            y = layer.feed_forward.forward(ops, x, config)
            x = ops.add(ops.rms_norm(y, layer.after_feed_forward, eps), x)
        return self.head.logits(ops, ops.rms_norm(x, self.norm, eps))
