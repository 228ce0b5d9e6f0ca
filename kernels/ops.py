"""The op protocol: every operation that a model may ask of a device.

A model is a function of an `Ops`, and of nothing else: it never touches a tensor, a shape or a
row count. So the same model code runs eagerly (a backend's own ops), or is recorded once into a
`Tape` of symbolic handles that a backend compiles and replays at any number of rows.

Activations are matrices `[rows, width]`. The rows are either the step's tokens or its sampled
positions; their number is known only when a step runs. The step's inputs (token ids,
positions, page tables) are one `Batch` that the backend holds, so no op takes them as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

T = TypeVar("T")

Activation = Literal["silu", "gelu_tanh", "relu2", "swiglu_oai"]
GateActivation = Literal["sigmoid", "gelu_tanh"]
# Of `swiglu_oai`: see `Ops.gated`.
SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0
# Added to a squared length before its root is taken: see `Ops.delta`.
L2_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that a backend has placed and owns; models only pass it on.

    `shape` is logical: `[out, in]` for a linear or an embedding table, `[n]` for a vector.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """Attention heads: `query` heads share `kv` key/value heads, each `dim` wide. Without any `kv`
    they are queries to keys and values that another layer makes.

    If `latent` is not 0, keys are latents: their first `latent` values are also what is mixed, and
    what attention gives behind those means nothing.
    """

    query: int
    kv: int
    dim: int
    latent: int = 0

    @property
    def qkv_width(self) -> int:
        """Width of a fused projection: queries, then keys, then values."""
        return (self.query + 2 * self.kv) * self.dim


@dataclass(frozen=True)
class LatentHeads:
    """`query` heads over one latent vector a token, `rank` wide, that is every head's key and value
    (multi-head latent attention, arXiv 2405.04434, its projections absorbed by their neighbours).
    A head also has `turned` values that are rotated and whose key all share; a query comes from
    `plain` values in front of those."""

    query: int
    rank: int
    plain: int
    turned: int

    @property
    def cached(self) -> Heads:
        """The heads that attention sees: of latents, behind which are the shared key's values."""
        return Heads(self.query, 1, self.rank + self.turned, self.rank)

    @property
    def query_width(self) -> int:
        """Width of the queries' projection."""
        return self.query * (self.plain + self.turned)


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
    """RMS norms over each query and key head, applied before rotation, and over each value head if
    there is one for them; weights are `[head_dim]`.

    With `whole`, the heads of all ranks together, there is one norm over all queries and one over
    all keys instead; weights are `[heads * head_dim]`, of the heads that are here.
    """

    query: Weight
    key: Weight
    eps: float
    value: Weight | None = None
    whole: Heads | None = None


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of a gated delta net (arXiv 2412.06464): `value` heads, of which `value // key` in a
    row share one of the `key` heads of queries and keys; `tiled` ones take turns instead, as ggml
    has them. Each channel is convolved over `taps` tokens.

    Without keys (`key` and `key_dim` 0) they are channels of a short convolution, and the state of
    a sequence is their last inputs alone.
    """

    key: int
    value: int
    key_dim: int
    value_dim: int
    taps: int
    tiled: bool = False

    @property
    def width(self) -> int:
        """Channels: queries, then keys, then values."""
        return 2 * self.key * self.key_dim + self.value * self.value_dim

    @property
    def memory(self) -> int:
        """Numbers that a sequence's memory holds."""
        return self.value * self.key_dim * self.value_dim

    def shapes(self, states: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of so many states of a layer: last inputs, and memories."""
        inputs = (states, self.taps - 1, self.width)
        return inputs, (states, self.value, self.key_dim, self.value_dim)

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's state: its memory and the last inputs of every channel, fp32."""
        return 4 * (self.memory + (self.taps - 1) * self.width)


@dataclass(frozen=True)
class Experts:
    """`count` feed-forward blocks of which each row goes through the `used` likeliest (arXiv
    2101.03961); `normalized` if their probabilities are then made to sum to 1.

    Probabilities are the scores' softmax or, with `sigmoid`, each score's own; a row's shares are
    these times `scale`. Of `groups` of equal size only the best `kept` are chosen from: by their
    two best experts together (DeepSeek-V3, arXiv 2412.19437) or, of a softmax, by their best
    (DeepSeek-V2, arXiv 2405.04434). All rows also go through `shared` others, numbered behind those
    that are chosen, with shares of 1 (DeepSeekMoE, arXiv 2401.06066) or, with `gated`, the sigmoid
    of a score of their own, which stand behind the others.
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
    gated: bool = False
    groups: int = 1
    kept: int = 1

    @property
    def scores(self) -> int:
        """Scores of a row."""
        return self.total if self.gated else self.count

    @property
    def total(self) -> int:
        """Those that are chosen from, and the shared ones."""
        return self.count + self.shared

    @property
    def sizes(self) -> tuple[int, ...]:
        """All that is counted."""
        return self.count, self.used, self.first, self.own, self.shared, self.groups, self.kept

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
        """`x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467) along each row, or each part of
        it that is as wide as `weight`."""
        ...

    def add_rms_norm(
        self, x: T, residual: T, weight: Weight, eps: float, scale: float = 1.0
    ) -> tuple[T, T]:
        """`(rms_norm(sum), sum)`, both as wide as `x`, of `sum = (x + residual) * scale`."""
        ...

    def add(self, x: T, y: T) -> T:
        """`x + y`, of one shape."""
        ...

    def linear(self, x: T, weight: Weight) -> T:
        """`x @ weight.T (+ bias)`: `[rows, in] -> [rows, out]`, fp32 out."""
        ...

    def head_squares(self, qkv: T, heads: Heads, keys: bool) -> T:
        """Each query head's sum of squares and, beside it, that of its key head, which the first
        of those that share it has, or none without `keys`; the others have 0.

        `qkv` is `[tokens, heads.qkv_width]`; `[tokens, 2 * query]`, fp32. With `keys` False another
        rank counts the one key head that is here.
        """
        ...

    def rope_write_kv(
        self,
        qkv: T,
        layer: int,
        heads: Heads,
        rope: Rope,
        norms: HeadNorms | None,
        squares: T | None = None,
    ) -> T:
        """Normalize and rotate queries and keys, write keys and values, if there are some, to the
        layer's pages.

        `qkv` is `[tokens, heads.qkv_width]`; returns the queries, `[tokens, query * dim]`. Norms of
        `whole` heads need all ranks' `head_squares` side by side, `[tokens, 2 * whole.query]`.
        """
        ...

    def head_linear(self, x: T, weight: Weight, heads: int) -> T:
        """Each head's part of x by its own rows of `weight`: `[rows, heads * n] -> [rows, heads *
        out]`, fp32 out.

        `weight` is a float one, `[heads * out, in]`; of a head's n values the first `in` count.
        """
        ...

    def write_latent(
        self, absorbed: T, q: T, kv: T, layer: int, heads: LatentHeads, rope: Rope, norm: Weight,
        eps: float,
    ) -> T:  # fmt: skip
        """Write each token's latent, normalized, and its key, rotated, to the layer's pages: one
        vector that is key and value.

        `kv` is `[tokens, rank + turned]`, `q` `[tokens, query_width]` and `absorbed`, what a head's
        key projection makes of its plain values, `[tokens, query * rank]`. Returns the queries,
        `[tokens, query * (rank + turned)]`: what is absorbed, then rotated values.
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
        factors: Weight | None = None,
    ) -> T:
        """What each row's experts say, side by side, times their probabilities.

        `x` is `[rows, n]`, `scores` `[rows, experts.scores]` logits; `gate_up` is `[own * 2 wide,
        n]`, each expert's gate and then its up projection, `down` `[own * n, wide]`; their biases
        are stacked alike. The likeliest of a row comes first, of equals the lower number, then the
        shared ones: `[rows, places * n]`, zeros for experts that are not held here. `preference`,
        `[count]`, is added to probabilities where experts are chosen, and nowhere else (arXiv
        2408.15664). Shares are multiplied by their experts' `factors`, `[count]`.
        """
        ...

    def sum_parts(self, x: T, parts: int) -> T:
        """Each row's parts, added in order: `[rows, parts * n] -> [rows, n]`."""
        ...

    def delta(
        self,
        qkv: T,
        gates: T,
        layer: int,
        heads: DeltaHeads,
        taps: Weight,
        decay: Weight,
        offset: Weight,
    ) -> T:
        """The gated delta rule (arXiv 2412.06464) over each sequence's state of delta layer
        `layer`; `[tokens, value * value_dim]`.

        Each channel of `qkv`, `[tokens, heads.width]`, becomes the SiLU of its last inputs times
        `taps`, `[heads.taps * heads.width]`, those of the oldest input first; queries and keys are
        then made unit vectors (L2_EPSILON), queries divided by sqrt(key_dim). `gates` `[tokens, 2 *
        value]` are b of every head, then a: its memory is multiplied by exp(-decay * softplus(a +
        offset)), and takes sigmoid(b) of what a token's value differs from what its key finds;
        `decay`, `offset` `[value]`. A state begins with zeros at position 0, and `Batch` says where
        it is kept.
        """
        ...

    def short_conv(self, x: T, layer: int, heads: DeltaHeads, taps: Weight) -> T:
        """A gated short convolution (Liquid AI's LFM2) over each sequence's state of layer `layer`
        among those that keep one; `[tokens, heads.width]`.

        `x`, `[tokens, 3 * heads.width]`, are gates b, gates c and values; each channel of b times
        values is convolved over its last inputs with `taps`, as in `delta`, and multiplied by c.
        """
        ...

    def gated_norm(self, x: T, gate: T, weight: Weight, eps: float) -> T:
        """Every part of `x` as wide as `weight` under a norm of its own, see `rms_norm`, times
        SiLU(gate): both `[rows, parts * n]`."""
        ...

    def gate(self, x: T, gate: T, activation: GateActivation, first: int = 0) -> T:
        """`x[:, first : first + n] * activation(gate)`: `[rows, n]`, as wide as `gate`."""
        ...

    def softcap(self, logits: T, cap: float) -> T:
        """`cap * tanh(logits / cap)` (Gemma 2, arXiv 2408.00118), of nothing but the logits."""
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
