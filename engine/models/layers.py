"""What model families share: placing weights by name, attention and feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.models.shard import Shard, Span
from engine.weights.checkpoint import Checkpoint
from engine.weights.views import Adjusted, Flat, Reordered
from kernels.backend import HostTensor, WeightStore
from kernels.ops import HeadNorms, Heads, Ops, T, Weight

# Buffers that older checkpoints store beside their weights; the values follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias")


# Families whose norms multiply by 1 + weight.
ONE_CENTRED = ("gemma3_text",)
ALONE = Shard()


@dataclass(frozen=True)
class Norm:
    """An RMS norm (arXiv 1910.07467)."""

    weight: Weight
    eps: float


@dataclass(frozen=True)
class Vocabulary:
    """A matrix with a row for each token, this rank's `weight` beginning with token `first`;
    `widths` are the ranks' numbers of tokens, empty if there is one rank."""

    weight: Weight
    first: int = 0
    widths: tuple[int, ...] = ()

    def embed(self, ops: Ops[T], scale: float) -> T:
        """The batch's tokens, `[tokens, columns]`."""
        x = ops.embed(self.weight, scale, self.first)
        return ops.all_reduce(x) if self.widths else x

    def logits(self, ops: Ops[T], x: T) -> T:
        """A number for each token, `[rows, tokens of the vocabulary]`."""
        x = ops.linear(x, self.weight)
        return ops.all_gather(x, self.widths) if self.widths else x


@dataclass(frozen=True)
class OutputProjection:
    """A block's last linear: its input is split among the ranks, its output is whole again.

    Either each rank multiplies the inputs that it has and the products are summed (`sums`), or, for
    weights and norms that want whole rows, inputs of the widths `inputs` are gathered and each rank
    makes some of the `outputs`, which are gathered, too.
    """

    weight: Weight
    norm: Norm | None = None
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    sums: bool = False

    def forward(self, ops: Ops[T], x: T) -> T:
        """`[rows, this rank's inputs] -> [rows, hidden]`."""
        if self.inputs:
            x = ops.all_gather(x, self.inputs)
        if self.norm is not None:
            x = ops.rms_norm(x, self.norm.weight, self.norm.eps)
        x = ops.linear(x, self.weight)
        if self.sums:
            return ops.all_reduce(x)
        return ops.all_gather(x, self.outputs) if self.outputs else x


class WeightLoader:
    """Places a checkpoint's tensors on a backend, checks shapes, and notes what was used.

    Of every tensor only the part is read that belongs to this rank's `shard`. With `exact`, ranks
    pass on activations instead of sums, so that they compute the bits that one rank would.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: WeightStore,
        progress: Callable[[int, int], None],
        shard: Shard = ALONE,
        *,
        exact: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.shard = shard
        self.exact = exact
        self._weights = weights
        self._unused = set(checkpoint.names())
        self._total = len(self._unused)
        self._progress = progress

    def has(self, name: str) -> bool:
        """Whether the file has such a tensor, and nobody took it yet."""
        return name in self._unused

    def vector(
        self, name: str, size: int, *, factor: float = 1.0, order: torch.Tensor | None = None
    ) -> Weight:
        """A norm's weight, `[size]`, times `factor`, in another `order` if one is given; every
        rank has it."""
        tensor = self._take(name, (size,))
        shifted = self.checkpoint.config.get("model_type") in ONE_CENTRED
        if shifted and not self.checkpoint.norms_include_one:
            tensor = Adjusted(tensor, offset=1.0)
        if factor != 1.0:
            tensor = Adjusted(tensor, factor)
        return self._weights.load([_in_order(tensor, order)])

    def sinks(self, name: str, heads: int, own: Span) -> Weight:
        """A score for each of the heads that this rank has."""
        return self._weights.load([self._take(name, (heads,)).narrow(0, own.start, own.length)])

    def vocabulary(self, name: str, rows: int, columns: int) -> Vocabulary:
        """An embedding table or an output head, `[rows, columns]`, split by rows."""
        tensor, shard = self._take(name, (rows, columns)), self.shard
        if shard.ranks == 1:
            return Vocabulary(self._weights.load([tensor], bits=8))
        spans = self.spans(rows, "vocab_size")
        own = spans[shard.rank]
        widths = tuple(span.length for span in spans)
        weight = self._weights.load([tensor.narrow(0, own.start, own.length)], bits=8)
        return Vocabulary(weight, own.start, widths)

    def spans(self, total: int, what: str, unit: int = 1) -> list[Span]:
        """Every rank's part of a dimension, cut at multiples of `unit` where that can be."""
        spans = self.shard.spans(total, unit) or self.shard.spans(total)
        if spans is None:
            raise ConfigError(f"{what} is {total}, too little for {self.shard.ranks} ranks")
        return spans

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        own: Sequence[Span],
        orders: Sequence[torch.Tensor | None] = (),
    ) -> Weight:
        """Projections of one input, stacked: modules `names`, with biases if the file has them; of
        each the outputs in `own`, each module's in another order if `orders` has one for it."""
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
        if orders:
            parts = [_in_order(part, order) for part, order in zip(parts, orders, strict=True)]
            if bias:
                bias = [_in_order(part, order) for part, order in zip(bias, orders, strict=True)]
        if self.shard.ranks == 1:
            return self._weights.load(parts, bias)
        return self._weights.load(_narrowed(parts, own), _narrowed(bias, own))

    def output(
        self, name: str, rows: int, columns: int, inputs: Sequence[Span], norm: Norm | None
    ) -> OutputProjection:
        """A block's last linear, of whose inputs each rank has those in `inputs`."""
        tensor, shard = self._take(f"{name}.weight", (rows, columns)), self.shard
        bias = []
        if f"{name}.bias" in self._unused:
            bias = [self._take(f"{name}.bias", (rows,))]
        if shard.ranks == 1:
            return OutputProjection(self._weights.load([tensor], bias), norm)
        unit = None if self.exact or norm is not None else self._weights.column_unit([tensor])
        own = inputs[shard.rank]
        if unit is not None and all(span.start % unit == 0 for span in inputs):
            part = tensor.narrow(1, own.start, own.length)
            added = bias if shard.rank == 0 else []
            return OutputProjection(self._weights.load([part], added), sums=True)
        outputs = self.spans(rows, "hidden_size")
        mine = [outputs[shard.rank]]
        weight = self._weights.load(_narrowed([tensor], mine), _narrowed(bias, mine))
        before, after = ([span.length for span in spans] for spans in (inputs, outputs))
        return OutputProjection(weight, norm, tuple(before), tuple(after))

    def router(self, name: str, rows: int, columns: int) -> Weight:
        """What chooses among experts; every rank has it, and it is rounded no further than to
        bfloat16: a score that comes out another way may lead to another expert."""
        bias = self._biases([name], rows)
        return self._weights.load([self._take(f"{name}.weight", (rows, columns))], bias, bits=16)

    def preference(self, name: str, count: int) -> Weight:
        """What is added to experts' probabilities where they are chosen."""
        stored = self.checkpoint.tensor(name).shape
        shape = (1, count) if len(stored) > 1 else (count,)
        return self._weights.load([Flat(self._take(name, shape))])

    def experts(
        self,
        names: Sequence[Sequence[str]],
        rows: int,
        columns: int,
        own: Span,
        shared: Sequence[str] = (),
        pieces: tuple[int, int] = (0, 0),
    ) -> Weight:
        """One projection of all experts, or two of one input; the modules of each expert, `rows`
        outputs each, stacked. Behind them come `shared` modules, which hold a number of experts
        side by side: `pieces` is the dimension, and how many. Of experts that are not `own` only
        biases are read."""
        parts = [
            [self._take(f"{name}.weight", (rows, columns)) for name in modules] for modules in names
        ]
        along, count = pieces
        size = (rows, columns)[along]
        whole = (rows * count, columns) if along == 0 else (rows, columns * count)
        wide = [self._take(f"{name}.weight", whole) for name in shared if count]
        if count and any(self._biases([name], whole[0]) for name in shared):
            raise ConfigError(f"{shared[0]!r} has a bias, which shared experts cannot")
        parts += [[w.narrow(along, n * size, size) for w in wide] for n in range(count)]
        biases = self._biases([name for modules in names for name in modules], rows)
        if biases and count:
            raise ConfigError(
                f"{names[0][0]!r} has a bias, which experts beside shared ones cannot"
            )
        mine = parts[own.start : own.start + own.length]
        added = own.times(len(parts[0]))
        return self._weights.load(
            [part for expert in mine for part in expert],
            biases[added.start : added.start + added.length],
        )

    def _biases(self, names: Sequence[str], rows: int) -> list[HostTensor]:
        """The biases of modules that have some, but for zeros: what quantizes models may write
        those to every linear."""
        found = [f"{name}.bias" for name in names if f"{name}.bias" in self._unused]
        biases = [self._take(name, (rows,)) for name in found]
        if not any(bool(bias.dense().any()) for bias in biases):
            return []
        if len(biases) < len(names):
            raise ConfigError(f"{found[0]!r} is there, but not for all of the {len(names)} like it")
        return biases

    def column_unit(self, name: str) -> int:
        """Where the columns of a linear may be cut, see `Backend.column_unit`; 1 if nowhere."""
        return self._weights.column_unit([self.checkpoint.tensor(f"{name}.weight")]) or 1

    def finish(self, *, tied: bool) -> None:
        """Refuse a file with tensors that the model has no place for: results would be wrong."""
        passed = self._guessing_ahead()
        left = {n for n in self._unused if not n.endswith(IGNORED_SUFFIXES)}
        left = {n for n in left if not n.startswith(passed)}
        if tied:
            left.discard("lm_head.weight")
        if left:
            raise ConfigError(
                f"{self.checkpoint.path.name} has {len(left)} tensors that a "
                f"{self.checkpoint.config.get('model_type')} model has no place for, "
                f"such as {min(left)!r}"
            )

    def _guessing_ahead(self) -> tuple[str, ...]:
        """How names begin of what guesses tokens further ahead, which is not done: layers behind
        the last one (GLM), or modules of their own (ERNIE)."""
        config = self.checkpoint.config
        layers, ahead = (config.get(k) for k in ("num_hidden_layers", "num_nextn_predict_layers"))
        numbers = range(layers, layers + ahead) if type(layers) is type(ahead) is int else ()
        behind = [f"{kind}.{n}." for n in numbers for kind in ("model.layers", "blk")]
        return (*behind, "model.mtp_")

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


def _in_order(tensor: HostTensor, order: torch.Tensor | None) -> HostTensor:
    return tensor if order is None else Reordered(tensor, order)


def _narrowed(tensors: Sequence[HostTensor], spans: Sequence[Span]) -> list[HostTensor]:
    """Of each tensor the rows in its span; none of none."""
    if not tensors:
        return []
    pairs = zip(tensors, spans, strict=True)
    return [tensor.narrow(0, span.start, span.length) for tensor, span in pairs]


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv 2305.13245) over the paged cache; `heads` are this rank's."""

    layer: int
    heads: Heads
    qkv: Weight
    norms: HeadNorms | None
    sinks: Weight | None
    output: OutputProjection

    def forward(
        self, ops: Ops[T], x: T, residual: T, config: ModelConfig, *, last: bool
    ) -> tuple[T, T]:
        """`[tokens, hidden] -> [rows, hidden]`, and those rows of the residual: all of them, or in
        the last layer, behind whose keys and values nobody asks for others, the step's sampled
        rows. Writes this layer's keys and values."""
        rope, window = config.ropes[self.layer], config.windows[self.layer]
        qkv = ops.linear(x, self.qkv)
        q = ops.rope_write_kv(qkv, self.layer, self.heads, rope, self.norms)
        scale = config.attention_scale
        x = ops.attention(q, self.layer, self.heads, scale, window, self.sinks)
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


def load_attention(load: WeightLoader, config: ModelConfig, layer: int) -> Attention:
    """The attention block of one layer, its three input projections stacked into one."""
    name = f"model.layers.{layer}.self_attn"
    heads = config.heads
    q, kv = heads.query * heads.dim, heads.kv * heads.dim
    order = _rotated_apart(heads.dim, config.rotated, neighbours=config.neighbours)
    norms = None
    if config.head_norms:
        query = load.vector(f"{name}.q_norm.weight", heads.dim, order=order)
        key = load.vector(f"{name}.k_norm.weight", heads.dim, order=order)
        norms = HeadNorms(query, key, config.norm_eps)
    inner = None
    if config.inner_norms:
        inner = Norm(load.vector(f"{name}.attn_sub_norm.weight", q), config.norm_eps)
    spans = load.shard.head_spans(heads)
    own = spans[load.shard.rank]
    rows = [own.query.times(heads.dim), *[own.kv.times(heads.dim)] * 2]
    inputs = [span.query.times(heads.dim) for span in spans]
    return Attention(
        layer,
        own.of(heads),
        load.linear(
            [f"{name}.{p}_proj" for p in "qkv"],
            [q, kv, kv],
            config.hidden,
            rows,
            [_of_heads(order, heads.query), _of_heads(order, heads.kv), None],
        ),
        norms,
        load.sinks(f"{name}.sinks", heads.query, own.query) if config.sinks else None,
        load.output(f"{name}.o_proj", config.hidden, q, inputs, inner),
    )


def _rotated_apart(dim: int, rotated: int, *, neighbours: bool) -> torch.Tensor | None:
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
    wide = config.intermediate
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
