"""Forward passes as data: what a model asks of its `Ops`, recorded once over symbolic handles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kernels.ops import (
    Activation,
    DeltaHeads,
    Experts,
    GateActivation,
    HeadNorms,
    Heads,
    LatentHeads,
    Ops,
    Rope,
    T,
    Weight,
)


class Rows(Enum):
    """Which of the step's two symbolic row counts an activation has."""

    TOKENS = "tokens"
    SAMPLES = "samples"


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

    def windows(self) -> dict[int, int]:
        """How far back each cached layer is seen, in positions; 0 is all the way."""
        found: dict[int, int] = {}
        for instruction in self.instructions:
            if instruction.op == "attention":
                _, layer, _, _, window, _ = instruction.arguments
                before = found.get(layer, window)
                found[layer] = max(before, window) if before and window else 0
        return found

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
        fits = x.width % weight.shape[0] == 0
        self._expect(fits, f"{weight.name} does not fit width {x.width}")
        return self._emit("rms_norm", (x, weight, eps), x.rows, x.width)

    def add_rms_norm(
        self, x: Handle, residual: Handle, weight: Weight, eps: float, scale: float = 1.0
    ) -> tuple[Handle, Handle]:
        self._expect(
            weight.shape == (x.width,) and (x.rows, x.width) == (residual.rows, residual.width),
            f"{weight.name}, x and residual differ in shape",
        )
        results = (self._handle(x.rows, x.width), self._handle(x.rows, x.width))
        self._append("add_rms_norm", (x, residual, weight, eps, scale), results)
        return results

    def add(self, x: Handle, y: Handle) -> Handle:
        self._expect((x.rows, x.width) == (y.rows, y.width), "what is added differs in shape")
        return self._emit("add", (x, y), x.rows, x.width)

    def linear(self, x: Handle, weight: Weight) -> Handle:
        self._expect(weight.shape[1] == x.width, f"{weight.name} does not fit width {x.width}")
        return self._emit("linear", (x, weight), x.rows, weight.shape[0])

    def head_squares(self, qkv: Handle, heads: Heads, keys: bool) -> Handle:
        self._expect(qkv.width == heads.qkv_width, f"qkv is {qkv.width} wide, not for its heads")
        self._expect(keys or heads.kv == 1, f"{heads.kv} key heads that nobody counts")
        return self._emit("head_squares", (qkv, heads, keys), qkv.rows, 2 * heads.query)

    def rope_write_kv(
        self,
        qkv: Handle,
        layer: int,
        heads: Heads,
        rope: Rope,
        norms: HeadNorms | None,
        squares: Handle | None = None,
    ) -> Handle:
        self._expect(qkv.width == heads.qkv_width, f"layer {layer}: qkv is {qkv.width} wide")
        whole = norms.whole if norms is not None else None
        wanted = 2 * whole.query if whole is not None else 0
        given = squares.width if squares is not None else 0
        self._expect(wanted == given, f"layer {layer}: {given} squares of heads, not {wanted}")
        if norms is not None:
            counts = (heads.query, heads.kv) if whole is not None else (1, 1)
            fits = (norms.query.shape, norms.key.shape) == tuple((n * heads.dim,) for n in counts)
            self._expect(fits, f"layer {layer}: {norms.query.name} does not fit its heads")
        width = heads.query * heads.dim
        arguments = (qkv, layer, heads, rope, norms, squares)
        return self._emit("rope_write_kv", arguments, qkv.rows, width)

    def head_linear(self, x: Handle, weight: Weight, heads: int) -> Handle:
        fits = x.width % heads == weight.shape[0] % heads == 0
        fits = fits and weight.shape[1] <= x.width // heads
        self._expect(fits, f"{weight.name} does not fit {heads} heads in width {x.width}")
        return self._emit("head_linear", (x, weight, heads), x.rows, weight.shape[0])

    def write_latent(
        self,
        absorbed: Handle,
        q: Handle,
        kv: Handle,
        layer: int,
        heads: LatentHeads,
        rope: Rope,
        norm: Weight,
        eps: float,
    ) -> Handle:
        widths = (heads.query * heads.rank, heads.query_width, heads.cached.dim)
        fits = (absorbed.width, q.width, kv.width) == widths and norm.shape == (heads.rank,)
        self._expect(fits, f"layer {layer}: latents are {kv.width} wide, queries {q.width}")
        arguments = (absorbed, q, kv, layer, heads, rope, norm, eps)
        return self._emit("write_latent", arguments, q.rows, heads.query * heads.cached.dim)

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
        factors: Weight | None = None,
    ) -> Handle:
        own = experts.own
        fits = (
            (scores.rows, scores.width) == (x.rows, experts.scores)
            and gate_up.shape[1] == x.width
            and down.shape[0] == own * x.width
            and gate_up.shape[0] == 2 * own * down.shape[1]
            and all(v is None or v.shape == (experts.count,) for v in (preference, factors))
        )
        self._expect(fits, f"{gate_up.name} and its neighbours are not {own} experts")
        arguments = (x, scores, gate_up, down, experts, activation, preference, factors)
        return self._emit("experts", arguments, x.rows, experts.places * x.width)

    def sum_parts(self, x: Handle, parts: int) -> Handle:
        self._expect(x.width % parts == 0, f"{x.width} values are not {parts} parts")
        return self._emit("sum_parts", (x, parts), x.rows, x.width // parts)

    def delta(
        self,
        qkv: Handle,
        gates: Handle,
        layer: int,
        heads: DeltaHeads,
        taps: Weight,
        decay: Weight,
        offset: Weight,
    ) -> Handle:
        fits = (
            (qkv.width, gates.width) == (heads.width, 2 * heads.value)
            and taps.shape == (heads.taps * heads.width,)
            and decay.shape == offset.shape == (heads.value,)
        )
        self._expect(fits, f"delta layer {layer}: qkv is {qkv.width} wide")
        arguments = (qkv, gates, layer, heads, taps, decay, offset)
        return self._emit("delta", arguments, qkv.rows, heads.value * heads.value_dim)

    def short_conv(self, x: Handle, layer: int, heads: DeltaHeads, taps: Weight) -> Handle:
        fits = x.width == 3 * heads.width and taps.shape == (heads.taps * heads.width,)
        self._expect(fits, f"convolution {layer}: its input is {x.width} wide")
        return self._emit("short_conv", (x, layer, heads, taps), x.rows, heads.width)

    def gated_norm(self, x: Handle, gate: Handle, weight: Weight, eps: float) -> Handle:
        fits = x.width == gate.width and x.width % weight.shape[0] == 0
        self._expect(fits, f"{weight.name} does not fit width {x.width}")
        return self._emit("gated_norm", (x, gate, weight, eps), x.rows, x.width)

    def gate(self, x: Handle, gate: Handle, activation: GateActivation, first: int = 0) -> Handle:
        fits = x.rows is gate.rows and first + gate.width <= x.width
        self._expect(fits, f"a gate of {gate.width} for {x.width} values, {first} left out")
        return self._emit("gate", (x, gate, activation, first), x.rows, gate.width)

    def softcap(self, logits: Handle, cap: float) -> Handle:
        return self._emit("softcap", (logits, cap), logits.rows, logits.width)

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
