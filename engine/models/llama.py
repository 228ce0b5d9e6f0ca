"""The Llama family: Llama 2 and 3, SmolLM2 and 3, Mistral, Mixtral, Qwen2, Qwen3 (also with
experts), Qwen3-Next and Qwen 3.5, LFM2, Phi-3 and 4, Granite, GLM, ERNIE 4.5, Seed-OSS, Helium,
gpt-oss, BitNet b1.58 and DeepSeek.

They are one model with switches: rope scaling, heads that rotate in part or by neighbours, layers
that do not, sliding windows, projection biases (taken when the file has them), query/key norms,
norms in front of the last projections, scales, attention sinks, gates, and layers of experts or
delta nets, of short convolutions, or of latent attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.config import ModelConfig
from engine.models.conv import ShortConv, load_conv
from engine.models.delta import DeltaNet, load_delta
from engine.models.experts import ExpertsFeedForward, load_block
from engine.models.latent import LatentAttention, load_latent
from engine.models.layers import Attention, GatedFeedForward, load_attention, load_head, own_heads
from engine.models.loader import WeightLoader
from kernels.ops import Ops, T, Weight

Mixer = Attention | LatentAttention | DeltaNet | ShortConv


@dataclass(frozen=True)
class Layer:
    """One pre-norm transformer layer."""

    attention_norm: Weight
    mixer: Mixer
    feed_forward_norm: Weight
    feed_forward: GatedFeedForward | ExpertsFeedForward


def load_mixer(load: WeightLoader, config: ModelConfig, layer: int) -> Mixer:
    """What lets the tokens of a sequence know of each other in one layer."""
    if config.latent is not None:
        return load_latent(load, config, layer)
    if layer not in config.delta_layers:
        return load_attention(load, config, layer)
    assert config.delta is not None
    return (load_delta if config.delta.key else load_conv)(load, config, layer)


class Llama:
    """A decoder-only transformer with pre-normalization (arXiv 2307.09288)."""

    def __init__(self, config: ModelConfig, load: WeightLoader) -> None:
        self.config = config
        self.heads = own_heads(load, config)
        self.delta = None if config.delta is None else load.shard.own_delta(config.delta)
        hidden = config.hidden
        self.embedding = load.vocabulary("model.embed_tokens.weight", config.vocab_size, hidden)
        self.layers = [
            Layer(
                load.vector(f"model.layers.{n}.input_layernorm.weight", hidden),
                load_mixer(load, config, n),
                load.vector(f"model.layers.{n}.post_attention_layernorm.weight", hidden),
                load_block(load, config, n),
            )
            for n in range(config.layers)
        ]
        self.norm = load.vector("model.norm.weight", hidden, factor=config.logits_scale)
        self.head = load_head(load, config, self.embedding)
        load.finish(tied=config.tied_embeddings)

    def forward(self, ops: Ops[T]) -> T:
        """Logits of the step's sampled rows, `[samples, vocab]`."""
        config, eps = self.config, self.config.norm_eps
        residual = self.embedding.embed(ops, config.embedding_scale)
        x = ops.rms_norm(residual, self.layers[0].attention_norm, eps)
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            last = following is None
            x, residual = layer.mixer.forward(ops, x, residual, config, last=last)
            x, residual = ops.add_rms_norm(x, residual, layer.feed_forward_norm, eps)
            x = layer.feed_forward.forward(ops, x, config)
            if following is not None:
                x, residual = ops.add_rms_norm(x, residual, following.attention_norm, eps)
        x, _ = ops.add_rms_norm(x, residual, self.norm, eps)
        return self.head.logits(ops, x)
