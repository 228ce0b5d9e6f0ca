"""Placing a checkpoint's weights by name, and the parts of a model that are little more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from engine.models.names import DELTA
from engine.models.shard import Shard, Span
from engine.weights.checkpoint import Checkpoint
from engine.weights.views import Adjusted, Computed, Flat, Reordered, Row
from kernels.backend import HostTensor, WeightStore
from kernels.ops import Ops, T, Weight

# Buffers that older checkpoints store beside their weights; the values follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias")


# Families whose norms multiply by 1 + weight.
ONE_CENTRED = ("gemma3_text", *DELTA)
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
        self,
        name: str,
        size: int,
        *,
        factor: float = 1.0,
        order: torch.Tensor | None = None,
        centred: bool = True,
    ) -> Weight:
        """A norm's weight, `[size]`, times `factor`, in another `order` if one is given; every
        rank has it. Only `centred` ones lack their 1 in families where norms do."""
        tensor = self._take(name, (size,))
        shifted = centred and self.checkpoint.config.get("model_type") in ONE_CENTRED
        if shifted and not self.checkpoint.norms_include_one:
            tensor = Adjusted(tensor, offset=1.0)
        if factor != 1.0:
            tensor = Adjusted(tensor, factor)
        return self._weights.load([_in_order(tensor, order)])

    def number(self, name: str) -> float:
        """The one value of a tensor."""
        return float(self._take(name, (1,)).dense())

    def part(self, name: str, size: int, own: Span) -> Weight:
        """Of a vector, `[size]`, what belongs to the heads that this rank has."""
        return self._weights.load([self._take(name, (size,)).narrow(0, own.start, own.length)])

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

    def picked(
        self, picks: Sequence[tuple[str, int, torch.Tensor]], columns: int, *, bits: int = 4
    ) -> Weight:
        """Projections of one input, stacked: of each module with so many outputs those that are
        numbered, this rank's own; rounded no further than to `bits`."""
        parts = [
            Reordered(self._take(f"{name}.weight", (rows, columns)), order)
            for name, rows, order in picks
        ]
        return self._weights.load(parts, bits=bits)

    def computed(
        self,
        name: str,
        shape: tuple[int, ...],
        function: Callable[[torch.Tensor], torch.Tensor],
        length: int,
    ) -> Weight:
        """A vector of `length` numbers that are a function of a tensor's, which has this shape, but
        for ones."""
        stored = self.checkpoint.tensor(name).shape
        plain = [size for size in stored if size > 1] == [size for size in shape if size > 1]
        tensor = self._take(name, stored if plain else shape)
        return self._weights.load([Computed(tensor, function, length)])

    def seen(
        self, name: str, shape: tuple[int, ...], view: Callable[[HostTensor], HostTensor]
    ) -> Weight:
        """What `view` makes of a tensor, rounded no further than to bfloat16."""
        return self._weights.load([view(self._take(name, shape))], bits=16)

    def taps(self, name: str, width: int, taps: int, channels: torch.Tensor) -> Weight:
        """The weights of a convolution of `width` channels, this rank's `channels` of them, those
        of the oldest input first."""
        return self.computed(
            f"{name}.weight",
            (width, 1, taps),
            lambda weights: weights.reshape(width, taps)[channels].t().flatten(),
            taps * len(channels),
        )

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

    def router(
        self, name: str, rows: int, columns: int, gate: tuple[str, int] | None = None
    ) -> Weight:
        """What chooses among experts, and behind it the one row of a `gate`, so many times; every
        rank has it, and it is rounded no further than to bfloat16: a score that comes out another
        way may lead to another expert."""
        bias = self._biases([name], rows)
        parts = [self._take(f"{name}.weight", (rows, columns))]
        if gate is not None:
            stored = self.checkpoint.tensor(f"{gate[0]}.weight").shape  # ggml has it as a vector
            shape = (columns,) if len(stored) == 1 else (1, columns)
            row = self._take(f"{gate[0]}.weight", shape)
            parts += [row if len(shape) > 1 else Row(row)] * gate[1]
        return self._weights.load(parts, bias, bits=16)

    def per_expert(self, name: str, count: int) -> Weight:
        """What is added to experts' probabilities where they are chosen, or multiplies their
        shares."""
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

    def finish(self, *, tied: bool, unread: tuple[str, ...] = ()) -> None:
        """Refuse a file with tensors that the model has no place for: results would be wrong.
        Names that begin as in `unread` are known to mean nothing."""
        passed = self._guessing_ahead()
        left = {n for n in self._unused if not n.endswith(IGNORED_SUFFIXES)}
        left = {n for n in left if not n.startswith((*passed, *unread))}
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
        return (*behind, "model.mtp_", "mtp.")

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


def numbers(span: Span) -> torch.Tensor:
    """What lies in a span, int64 `[length]`."""
    return torch.arange(span.start, span.start + span.length)


def _in_order(tensor: HostTensor, order: torch.Tensor | None) -> HostTensor:
    return tensor if order is None else Reordered(tensor, order)


def _narrowed(tensors: Sequence[HostTensor], spans: Sequence[Span]) -> list[HostTensor]:
    """Of each tensor the rows in its span; none of none."""
    if not tensors:
        return []
    pairs = zip(tensors, spans, strict=True)
    return [tensor.narrow(0, span.start, span.length) for tensor, span in pairs]
