"""What model families share: placing weights by name, attention and feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.weights.checkpoint import Checkpoint
from kernels.backend import Backend, HostTensor
from kernels.ops import HeadNorms, Ops, T, Weight

# Buffers that older checkpoints store beside their weights; the values follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias")


# Families whose norms multiply by 1 + weight.
ONE_CENTRED = ("gemma3_text",)


@dataclass(frozen=True, eq=False)
class PlusOne:
    """A tensor with 1 added to every value."""

    tensor: HostTensor

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def format(self) -> str:
        return "F32"

    def dense(self) -> torch.Tensor:
        return self.tensor.dense().float() + 1.0

    def packed(self) -> torch.Tensor:
        return self.tensor.packed()


class WeightLoader:
    """Places a checkpoint's tensors on a backend, checks shapes, and notes what was used."""

    def __init__(
        self, checkpoint: Checkpoint, backend: Backend, progress: Callable[[int, int], None]
    ) -> None:
        self.checkpoint = checkpoint
        self._backend = backend
        self._unused = set(checkpoint.names())
        self._total = len(self._unused)
        self._progress = progress

    def vector(self, name: str, size: int) -> Weight:
        """A norm's weight, `[size]`."""
        tensor = self._take(name, (size,))
        shifted = self.checkpoint.config.get("model_type") in ONE_CENTRED
        if shifted and not self.checkpoint.norms_include_one:
            tensor = PlusOne(tensor)
        return self._backend.load([tensor])

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        """An embedding table or an output head, `[rows, columns]`."""
        return self._backend.load([self._take(name, (rows, columns))])

    def linear(self, names: Sequence[str], rows: Sequence[int], columns: int) -> Weight:
        """Projections of one input, stacked: modules `names`, with biases if the file has them."""
        parts = [
            self._take(f"{name}.weight", (r, columns)) for name, r in zip(names, rows, strict=True)
        ]
        biased = [f"{name}.bias" in self._unused for name in names]
        if any(biased) and not all(biased):
            raise ConfigError(f"only some of {', '.join(names)} have a bias")
        bias = (
            [self._take(f"{n}.bias", (r,)) for n, r in zip(names, rows, strict=True)]
            if all(biased)
            else []
        )
        return self._backend.load(parts, bias)

    def finish(self, *, tied: bool) -> None:
        """Refuse a file with tensors that the model has no place for: results would be wrong."""
        left = {n for n in self._unused if not n.endswith(IGNORED_SUFFIXES)}
        if tied:
            left.discard("lm_head.weight")
        if left:
            raise ConfigError(
                f"{self.checkpoint.path.name} has {len(left)} tensors that a "
                f"{self.checkpoint.config.get('model_type')} model has no place for, "
                f"such as {min(left)!r}"
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> HostTensor:
        tensor = self.checkpoint.tensor(name)
        if tensor.shape != shape:
            raise ConfigError(
                f"tensor {name!r} has shape {list(tensor.shape)}, "
                f"but the configuration says {list(shape)}"
            )
        self._unused.discard(name)
        self._progress(self._total - len(self._unused), self._total)
        return tensor


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv 2305.13245) over the paged cache."""

    layer: int
    qkv: Weight
    output: Weight
    norms: HeadNorms | None
    inner_norm: Weight | None

    def forward(self, ops: Ops[T], x: T, config: ModelConfig) -> T:
        """`[tokens, hidden] -> [tokens, hidden]`; writes this layer's keys and values."""
        rope, window = config.ropes[self.layer], config.windows[self.layer]
        qkv = ops.linear(x, self.qkv)
        q = ops.rope_write_kv(qkv, self.layer, config.heads, rope, self.norms)
        mixed = ops.attention(q, self.layer, config.heads, config.attention_scale, window)
        if self.inner_norm is not None:
            mixed = ops.rms_norm(mixed, self.inner_norm, config.norm_eps)
        return ops.linear(mixed, self.output)


@dataclass(frozen=True)
class GatedFeedForward:
    """A gated feed-forward block (arXiv 2002.05202)."""

    gate_up: Weight
    down: Weight
    inner_norm: Weight | None

    def forward(self, ops: Ops[T], x: T, config: ModelConfig) -> T:
        """`[tokens, hidden] -> [tokens, hidden]`."""
        active = ops.gated(ops.linear(x, self.gate_up), config.activation)
        if self.inner_norm is not None:
            active = ops.rms_norm(active, self.inner_norm, config.norm_eps)
        return ops.linear(active, self.down)


def load_attention(load: WeightLoader, config: ModelConfig, layer: int) -> Attention:
    """The attention block of one layer, its three input projections stacked into one."""
    name = f"model.layers.{layer}.self_attn"
    heads = config.heads
    q, kv = heads.query * heads.dim, heads.kv * heads.dim
    norms = None
    if config.head_norms:
        query = load.vector(f"{name}.q_norm.weight", heads.dim)
        norms = HeadNorms(query, load.vector(f"{name}.k_norm.weight", heads.dim), config.norm_eps)
    return Attention(
        layer,
        load.linear([f"{name}.{p}_proj" for p in "qkv"], [q, kv, kv], config.hidden),
        load.linear([f"{name}.o_proj"], [config.hidden], q),
        norms,
        load.vector(f"{name}.attn_sub_norm.weight", q) if config.inner_norms else None,
    )


def load_feed_forward(load: WeightLoader, config: ModelConfig, layer: int) -> GatedFeedForward:
    """The feed-forward block of one layer, gate and up projections stacked into one."""
    name = f"model.layers.{layer}.mlp"
    wide = config.intermediate
    return GatedFeedForward(
        load.linear([f"{name}.gate_proj", f"{name}.up_proj"], [wide, wide], config.hidden),
        load.linear([f"{name}.down_proj"], [config.hidden], wide),
        load.vector(f"{name}.ffn_sub_norm.weight", wide) if config.inner_norms else None,
    )


def load_head(load: WeightLoader, config: ModelConfig, embedding: Weight) -> Weight:
    """The output head: a matrix of its own, or the embedding table again."""
    if config.tied_embeddings:
        return embedding
    return load.matrix("lm_head.weight", config.vocab_size, config.hidden)
