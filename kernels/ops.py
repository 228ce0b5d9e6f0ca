"""The op protocol: every operation that a model may ask of a device.

A model is a function of an `Ops`, and of nothing else: it never touches a tensor, a shape or a
row count. So the same model code runs eagerly (a backend's own ops), or is recorded once into a
`Tape` of symbolic handles that a backend compiles and replays at any number of rows.

Activations are matrices `[rows, width]`. The rows are either the step's tokens or its sampled
positions (`Rows`); their number is known only when a step runs. The step's inputs (token ids,
positions, page tables) are one `Batch` that the backend holds, so no op takes them as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

Activation = Literal["silu", "gelu_tanh", "relu2", "swiglu_oai"]
# Of `swiglu_oai`: see `Ops.gated`.
SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0


class Rows(Enum):
    """Which of the step's two symbolic row counts an activation has."""

    TOKENS = "tokens"
    SAMPLES = "samples"


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that a backend has placed and owns; models only pass it on.

    `shape` is logical: `[out, in]` for a linear or an embedding table, `[n]` for a vector.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """Attention heads: `query` heads share `kv` key/value heads, each `dim` wide."""

    query: int
    kv: int
    dim: int

    @property
    def qkv_width(self) -> int:
        """Width of a fused projection: queries, then keys, then values."""
        return (self.query + 2 * self.kv) * self.dim


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding in the half-split (NeoX) form (Su et al., arXiv 2104.09864).

    `inverse_frequencies` has head_dim / 2 entries, any context-length scaling already applied. What
    is rotated is multiplied by `magnitude`, too; a pair whose frequency is 0 stays as it is.
    Queries at position p are multiplied by 1 + growth * ln(1 + floor(p / step)), if `growth` is not
    0 (the attention temperature of Llama 4).
    """

    inverse_frequencies: tuple[float, ...]
    magnitude: float = 1.0
    growth: float = 0.0
    step: int = 1


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms over each query and key head, applied before rotation; weights are `[head_dim]`."""

    query: Weight
    key: Weight
    eps: float


@dataclass(frozen=True)
class Experts:
    """`count` feed-forward blocks of which each row goes through the `used` likeliest (arXiv
    2101.03961); `normalized` if their probabilities are then made to sum to 1.

    Probabilities are the scores' softmax or, with `sigmoid`, each score's own; a row's shares are
    these times `scale`. All rows also go through `shared` others, numbered behind those that are
    chosen, with shares of 1 (DeepSeekMoE, arXiv 2401.06066).
    Experts `first` to `first + own` are held here, stacked in one weight for each projection.
    """

    count: int
    used: int
    normalized: bool
    first: int
    own: int
    sigmoid: bool = False
    scale: float = 1.0
    shared: int = 0

    @property
    def total(self) -> int:
        """Those that are chosen from, and the shared ones."""
        return self.count + self.shared

    @property
    def places(self) -> int:
        """Experts that a row goes through."""
        return self.used + self.shared


class Ops(Protocol[T]):
    """Every device operation. `T` is the backend's activation: a tensor, or a symbolic `Handle`.

    Activations are float; a backend may store them narrower than fp32 if it says so.
    """

    def embed(self, table: Weight, scale: float, first: int = 0) -> T:
        """Rows of `table` for the batch's token ids, times `scale`: `[tokens, columns]`.

        The table begins with token `first`; tokens that it does not hold have rows of zeros.
        """
        ...

    def rms_norm(self, x: T, weight: Weight, eps: float) -> T:
        """`x / sqrt(mean(x^2) + eps) * weight` along each row (arXiv 1910.07467)."""
        ...

    def add_rms_norm(self, x: T, residual: T, weight: Weight, eps: float) -> tuple[T, T]:
        """`(rms_norm(x + residual), x + residual)`: both as wide as `x`."""
        ...

    def linear(self, x: T, weight: Weight) -> T:
        """`x @ weight.T (+ bias)`: `[rows, in] -> [rows, out]`, fp32 out."""
        ...

    def rope_write_kv(
        self, qkv: T, layer: int, heads: Heads, rope: Rope, norms: HeadNorms | None
    ) -> T:
        """Normalize and rotate queries and keys, write keys and values to the layer's pages.

        `qkv` is `[tokens, heads.qkv_width]`; returns the queries, `[tokens, query * dim]`.
        """
        ...

    def attention(
        self, q: T, layer: int, heads: Heads, scale: float, window: int, sinks: Weight | None = None
    ) -> T:
        """Causal attention of each token over its sequence's pages; `[tokens, query * dim]`.

        Any mixture of prefill chunks and decodes. With `window > 0` a token at position p sees
        positions above p - window only. Keys and values are read as the cache stores them. `sinks`,
        `[query]`, are scores of one more key a head, which has no value (arXiv 2309.17453).
        """
        ...

    def gated(self, x: T, activation: Activation) -> T:
        """`activation(x[:, :half]) * x[:, half:]`: `[rows, 2n] -> [rows, n]`.

        `swiglu_oai` (gpt-oss, arXiv 2508.10925) takes the gate g up to SWIGLU_LIMIT and the rest u
        within it on both sides: `g * sigmoid(SWIGLU_SLOPE * g) * (u + 1)`.
        """
        ...

    def experts(
        self,
        x: T,
        scores: T,
        gate_up: Weight,
        down: Weight,
        experts: Experts,
        activation: Activation,
        preference: Weight | None = None,
    ) -> T:
        """What each row's experts say, side by side, times their probabilities.

        `x` is `[rows, n]`, `scores` `[rows, count]` logits; `gate_up` is `[own * 2 wide, n]`, each
        expert's gate and then its up projection, `down` `[own * n, wide]`; their biases are stacked
        alike. The likeliest of a row comes first, of equals the lower number, then the shared ones:
        `[rows, places * n]`, zeros for experts that are not held here. `preference`, `[count]`, is
        added to probabilities where experts are chosen, and nowhere else (arXiv 2408.15664).
        """
        ...

    def sum_parts(self, x: T, parts: int) -> T:
        """Each row's parts, added in order: `[rows, parts * n] -> [rows, n]`."""
        ...

    def select_rows(self, x: T) -> T:
        """The rows whose logits the step needs: `[tokens, n] -> [samples, n]`."""
        ...

    def all_reduce(self, x: T) -> T:
        """The sum of all ranks' `x`, which are of one width."""
        ...

    def all_gather(self, x: T, widths: tuple[int, ...]) -> T:
        """All ranks' `x` side by side, rank r's `widths[r]` wide: `[rows, sum(widths)]`."""
        ...


@dataclass(frozen=True)
class Handle:
    """A symbolic activation on a tape: its number, which rows it has, and its width."""

    index: int
    rows: Rows
    width: int


@dataclass(frozen=True)
class Instruction:
    """One recorded op. `arguments` mixes handles with static values; `results` are handles."""

    op: str
    arguments: tuple[Any, ...]
    results: tuple[Handle, ...]


@dataclass(frozen=True)
class Tape:
    """A model's forward pass as data: instructions in order, and the handle of the logits."""

    instructions: tuple[Instruction, ...]
    logits: Handle
    last_use: tuple[tuple[int, ...], ...] = field(repr=False, default=())

    def replay(self, ops: Ops[T]) -> T:
        """Run every instruction on `ops`, and return the logits."""
        values: dict[int, T] = {}
        self.run(ops, values)
        return values[self.logits.index]

    def run(
        self, ops: Ops[T], values: dict[int, T], start: int = 0, end: int | None = None
    ) -> None:
        """Run the instructions from `start` up to `end` on `ops`: what they need is in `values`, by
        handle, what they give goes there, and each activation leaves it after its last use."""
        for instruction, dead in zip(
            self.instructions[start:end], self.last_use[start:end], strict=True
        ):
            arguments = [
                values[a.index] if isinstance(a, Handle) else a for a in instruction.arguments
            ]
            produced = getattr(ops, instruction.op)(*arguments)
            if len(instruction.results) == 1:
                produced = (produced,)
            for handle, value in zip(instruction.results, produced, strict=True):
                values[handle.index] = value
            for index in dead:
                del values[index]


class Recorder:
    """An `Ops[Handle]` that writes down what a model asks for, checking widths as it goes."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._count = 0

    def finish(self, logits: Handle) -> Tape:
        """The tape of everything recorded, ending in `logits`."""
        last: dict[int, int] = {}
        for number, instruction in enumerate(self._instructions):
            for value in (*instruction.arguments, *instruction.results):
                if isinstance(value, Handle):
                    last[value.index] = number
        last.pop(logits.index, None)
        dead: list[list[int]] = [[] for _ in self._instructions]
        for index, number in last.items():
            dead[number].append(index)
        return Tape(tuple(self._instructions), logits, tuple(tuple(d) for d in dead))

    def embed(self, table: Weight, scale: float, first: int = 0) -> Handle:
        return self._emit("embed", (table, scale, first), Rows.TOKENS, table.shape[1])

    def rms_norm(self, x: Handle, weight: Weight, eps: float) -> Handle:
        self._expect(weight.shape == (x.width,), f"{weight.name} does not fit width {x.width}")
        return self._emit("rms_norm", (x, weight, eps), x.rows, x.width)

    def add_rms_norm(
        self, x: Handle, residual: Handle, weight: Weight, eps: float
    ) -> tuple[Handle, Handle]:
        self._expect(
            weight.shape == (x.width,) and (x.rows, x.width) == (residual.rows, residual.width),
            f"{weight.name}, x and residual differ in shape",
        )
        results = (self._handle(x.rows, x.width), self._handle(x.rows, x.width))
        self._append("add_rms_norm", (x, residual, weight, eps), results)
        return results

    def linear(self, x: Handle, weight: Weight) -> Handle:
        self._expect(weight.shape[1] == x.width, f"{weight.name} does not fit width {x.width}")
        return self._emit("linear", (x, weight), x.rows, weight.shape[0])

    def rope_write_kv(
        self, qkv: Handle, layer: int, heads: Heads, rope: Rope, norms: HeadNorms | None
    ) -> Handle:
        self._expect(qkv.width == heads.qkv_width, f"layer {layer}: qkv is {qkv.width} wide")
        width = heads.query * heads.dim
        return self._emit("rope_write_kv", (qkv, layer, heads, rope, norms), qkv.rows, width)

    def attention(
        self,
        q: Handle,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        sinks: Weight | None = None,
    ) -> Handle:
        fits = sinks is None or sinks.shape == (heads.query,)
        self._expect(fits, f"layer {layer}: sinks are not one a head")
        self._expect(q.width == heads.query * heads.dim, f"layer {layer}: q is {q.width} wide")
        return self._emit("attention", (q, layer, heads, scale, window, sinks), q.rows, q.width)

    def gated(self, x: Handle, activation: Activation) -> Handle:
        self._expect(x.width % 2 == 0, f"gated input is {x.width} wide")
        return self._emit("gated", (x, activation), x.rows, x.width // 2)

    def experts(
        self,
        x: Handle,
        scores: Handle,
        gate_up: Weight,
        down: Weight,
        experts: Experts,
        activation: Activation,
        preference: Weight | None = None,
    ) -> Handle:
        own = experts.own
        fits = (
            (scores.rows, scores.width) == (x.rows, experts.count)
            and gate_up.shape[1] == x.width
            and down.shape[0] == own * x.width
            and gate_up.shape[0] == 2 * own * down.shape[1]
            and (preference is None or preference.shape == (experts.count,))
        )
        self._expect(fits, f"{gate_up.name} and its neighbours are not {own} experts")
        arguments = (x, scores, gate_up, down, experts, activation, preference)
        return self._emit("experts", arguments, x.rows, experts.places * x.width)

    def sum_parts(self, x: Handle, parts: int) -> Handle:
        self._expect(x.width % parts == 0, f"{x.width} values are not {parts} parts")
        return self._emit("sum_parts", (x, parts), x.rows, x.width // parts)

    def select_rows(self, x: Handle) -> Handle:
        self._expect(x.rows is Rows.TOKENS, "rows are selected from token rows, once")
        return self._emit("select_rows", (x,), Rows.SAMPLES, x.width)

    def all_reduce(self, x: Handle) -> Handle:
        return self._emit("all_reduce", (x,), x.rows, x.width)

    def all_gather(self, x: Handle, widths: tuple[int, ...]) -> Handle:
        self._expect(x.width in widths, f"no rank's part is {x.width} wide")
        return self._emit("all_gather", (x, widths), x.rows, sum(widths))

    def _emit(self, op: str, arguments: tuple[Any, ...], rows: Rows, width: int) -> Handle:
        result = self._handle(rows, width)
        self._append(op, arguments, (result,))
        return result

    def _append(self, op: str, arguments: tuple[Any, ...], results: Sequence[Handle]) -> None:
        self._instructions.append(Instruction(op, arguments, tuple(results)))

    def _handle(self, rows: Rows, width: int) -> Handle:
        self._count += 1
        return Handle(self._count - 1, rows, width)

    @staticmethod
    def _expect(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"the model does not fit its weights: {message}")
