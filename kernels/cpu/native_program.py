"""A tape as native instructions: one call runs a step, another samples it."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.batch import Batch, Samples, Sampling
from kernels.cpu.native_latent import LatentInstructions
from kernels.cpu.native_sampling import NativeChooser, address
from kernels.cpu.native_steps import NativeQueue
from kernels.ops import DeltaHeads, Experts, HeadNorms, Heads, Rope
from kernels.rotation import Rotations
from kernels.sampling import sample
from kernels.steps import Tables
from kernels.tape import Handle, Instruction, Tape
from kernels.tape import Rows as RowCount

if TYPE_CHECKING:
    from kernels.cpu.native_backend import LayerMemory
    from kernels.cpu.native_weights import NativeWeight
    from kernels.reference import LayerStates

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu2": 2, "swiglu_oai": 3}
GATE_ACTIVATIONS = {"sigmoid": 0, "gelu_tanh": 2}
# The forms in which a buffer can hold its rows, in the order of `add_buffer`'s flags.
FORMS = ("floats", "groups", "whole", "bf16")
FLOAT_WRITERS = (
    "linear",
    "attention",
    "rope_write_kv",
    "all_reduce",
    "all_gather",
    "experts",
    "delta",
    "head_linear",
    "write_latent",
)
# Whose results stay floats.
NEVER_QUANTIZED = ("linear", "rope_write_kv", "write_latent", "experts")
# Bytes a value: groups of 32 have a scale, a sum and an offset.
FORM_BYTES = (4.0, 1.0 + 12 / 32, 1.0, 2.0)


def run(program: Any, batch: Batch) -> None:
    """One step of a native program."""

    def at(array: npt.NDArray[Any] | None) -> int:
        return 0 if array is None else address(array)

    program.run(
        address(batch.token_ids),
        address(batch.positions),
        address(batch.kv_slots),
        address(batch.query_starts),
        address(batch.context_lengths),
        address(batch.table_rows),
        address(batch.page_table),
        address(batch.sample_rows),
        len(batch.token_ids),
        len(batch.context_lengths),
        len(batch.sample_rows),
        batch.page_table.shape[1],
        at(batch.kept_rows),
        at(batch.kept_at),
        at(batch.window_slots),
        at(batch.window_table),
    )


class NativeProgram(LatentInstructions):
    """A tape turned into native instructions; `forward` is one call."""

    def __init__(
        self,
        native: ModuleType,
        device: Any,
        tape: Tape,
        max_rows: int,
        max_context: int,
        exchange: Any = None,
    ) -> None:
        self._native, self._device = native, device
        self._choose = NativeChooser(device)
        self._program = native.Program(device, max_rows, exchange)
        self._tape = tape  # the program holds addresses into its weights
        self._rotations = Rotations(torch.device("cpu"))
        self._logits = _lazy_floats(max_rows, tape.logits.width)
        self.memory: list[LayerMemory] = []
        self.states: list[LayerStates] = []
        self._experts: dict[Any, list[int]] = {}
        self._deltas: dict[DeltaHeads, tuple[int, int]] = {}
        # Of all buffers; memory is taken for the rows that are ever written.
        self._row_bytes = dict.fromkeys(RowCount, 0.0)
        self._max_rows = max_rows
        # The native program, where its logits lie, and their width.
        self.handle = self._program, self._logits.data_ptr(), tape.logits.width
        self._positions = max_context
        self._build(tape)

    def add_cache(self, memory: LayerMemory, cache: Any) -> None:
        """The next layer's cache, and the memory that it has addresses into."""
        self.memory.append(memory)
        self._program.add_cache(cache)

    def add_states(self, memory: LayerStates, states: Any) -> None:
        """The next delta layer's states, and the memory that they have addresses into."""
        self.states.append(memory)
        self._program.add_states(states)

    def forward(self, batch: Batch) -> None:
        run(self._program, batch)

    @torch.inference_mode()
    def sample(self, sampling: Sampling) -> Samples:
        return sample(self.logits(), sampling, self._choose)

    def queue(self, tables: Tables) -> NativeQueue:
        return NativeQueue(self._native, self._device, tables)

    def buffer_bytes(self, sampled_rows: int) -> int:
        sampled = min(sampled_rows, self._max_rows)
        row_bytes = self._row_bytes
        logits = sampled * self._tape.logits.width * 4
        return (
            int(row_bytes[RowCount.TOKENS] * self._max_rows + row_bytes[RowCount.SAMPLES] * sampled)
            + logits
        )

    def logits(self) -> torch.Tensor:
        return self._logits[: self._program.samples]

    def profile(self, on: bool) -> None:
        """Start or stop timing instructions; both set the times back to zero."""
        self._program.profile(on)

    def nanoseconds(self) -> dict[str, int]:
        """Time spent in each kind of op since profiling started."""
        times: dict[str, int] = self._program.nanoseconds()
        return times

    @property
    def strands(self) -> int:
        """Among how many threads the last step was shared out by sequences; 0 if it was by ops."""
        strands: int = self._program.strands
        return strands

    def _build(self, tape: Tape) -> None:
        """One call an instruction; a buffer that has been read goes to the next of its kind."""
        kinds = {
            h.index: (h.rows, h.width, *_forms(h, tape))
            for i in tape.instructions
            for h in i.results
        }
        capped = [i.arguments[0] for i in tape.instructions if i.op == "softcap"]
        in_logits = (tape.logits, *capped)
        buffers: dict[int, int] = {}
        free: dict[tuple[object, ...], list[int]] = {kind: [] for kind in kinds.values()}
        for instruction, dead in zip(tape.instructions, tape.last_use, strict=True):
            for handle in instruction.results:
                if handle not in in_logits:
                    kind = kinds[handle.index]
                    spare = free[kind]
                    if spare:
                        buffers[handle.index] = spare.pop()
                        continue
                    width, forms = handle.width, _forms(handle, tape)
                    buffers[handle.index] = self._program.add_buffer(width, *forms)
                    held = sum(size for size, form in zip(FORM_BYTES, forms, strict=True) if form)
                    self._row_bytes[handle.rows] += width * held
            emit = getattr(self, f"_emit_{instruction.op}")
            arguments = [
                buffers.get(a.index) if isinstance(a, Handle) else a for a in instruction.arguments
            ]
            emit(*arguments, *(buffers.get(handle.index) for handle in instruction.results))
            for index in dead:
                if index in buffers:
                    free[kinds[index]].append(buffers[index])

    def _emit_embed(self, table: NativeWeight, scale: float, first: int, out: int) -> None:
        self._program.add("embed", out=out, weight=table.packed, scalar=scale, first=first)

    def _emit_rms_norm(self, x: int, weight: NativeWeight, eps: float, out: int) -> None:
        width = weight.shape[0]
        self._program.add(
            "rms_norm", in_=x, out=out, vector=weight.address, scalar=eps, window=width
        )

    def _emit_add_rms_norm(
        self,
        x: int,
        residual: int,
        weight: NativeWeight,
        eps: float,
        scale: float,
        out: int,
        total: int,
    ) -> None:
        self._program.add(
            "add_rms_norm",
            in_=x,
            in2=residual,
            out=out,
            out2=total,
            vector=weight.address,
            scalar=eps,
            factor=scale,
        )

    def _emit_add(self, x: int, y: int, out: int) -> None:
        self._program.add("add", in_=x, in2=y, out=out)

    def _emit_linear(self, x: int, weight: NativeWeight, out: int | None) -> None:
        self._program.add(
            "linear", in_=x, weight=weight.packed, vector=weight.bias_address, **self._place(out)
        )

    def _emit_all_reduce(self, x: int, out: int) -> None:
        self._program.add("all_reduce", in_=x, out=out)

    def _emit_all_gather(self, x: int, widths: tuple[int, ...], out: int | None) -> None:
        self._program.add("all_gather", in_=x, widths=list(widths), **self._place(out))

    def _place(self, out: int | None) -> dict[str, int]:
        """Where an instruction writes: a buffer, or the logits."""
        return {"target": self._logits.data_ptr()} if out is None else {"out": out}

    def _emit_head_squares(self, qkv: int, heads: Heads, keys: bool, out: int) -> None:
        counted = heads.kv if keys else 0
        self._program.add(
            "head_squares", in_=qkv, out=out, heads=heads.query, kv_heads=counted, window=heads.dim
        )

    def _emit_rope_write_kv(
        self,
        qkv: int,
        layer: int,
        heads: Heads,
        rope: Rope,
        norms: HeadNorms | None,
        squares: int | None,
        out: int,
    ) -> None:
        cosine, sine, growth = self._rotations.of(rope, self._positions)
        whole = norms.whole if norms is not None else None
        self._program.add(
            "rope_write_kv",
            in_=qkv,
            in2=-1 if squares is None else squares,
            out=out,
            layer=layer,
            heads=heads.query,
            kv_heads=heads.kv,
            window=whole.kv if whole is not None else 0,
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            growth=growth.data_ptr() if growth is not None else 0,
            vector=_at(norms and norms.query),
            vector2=_at(norms and norms.key),
            vector3=_at(norms and norms.value),
            scalar=norms.eps if norms is not None else 0.0,
        )

    def _emit_attention(
        self,
        q: int,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        sinks: NativeWeight | None,
        out: int,
    ) -> None:
        self._program.add(
            "attention",
            in_=q,
            out=out,
            layer=layer,
            heads=heads.query,
            vector=_at(sinks),
            scalar=scale,
            window=window,
        )

    def _emit_gated(self, x: int, activation: str, out: int) -> None:
        self._program.add("gated", in_=x, out=out, activation=ACTIVATIONS[activation])

    def _emit_experts(
        self,
        x: int,
        scores: int,
        gate_up: NativeWeight,
        down: NativeWeight,
        experts: Experts,
        activation: str,
        preference: NativeWeight | None,
        factors: NativeWeight | None,
        out: int,
    ) -> None:
        self._program.add_experts(
            in_=x,
            scores=scores,
            out=out,
            gate_up=gate_up.packed,
            down=down.packed,
            gate_up_bias=gate_up.bias_address,
            down_bias=down.bias_address,
            preference=_at(preference),
            factors=_at(factors),
            sizes=experts.sizes,
            normalized=experts.normalized,
            sigmoid=experts.sigmoid,
            gated=experts.gated,
            scale=experts.scale,
            activation=ACTIVATIONS[activation],
            buffers=self._expert_buffers(gate_up, down, experts.places),
        )

    def _expert_buffers(self, gate_up: NativeWeight, down: NativeWeight, places: int) -> list[int]:
        """Room for a row's copies and what becomes of them; layers of one shape share it."""
        hidden, wide = gate_up.shape[1], down.shape[1]
        kinds = (
            (hidden, gate_up.reads),
            (2 * wide, "floats"),
            (wide, down.reads),
            (hidden, "floats"),
        )
        key = (kinds, places)
        if key not in self._experts:
            self._experts[key] = []
            for width, wanted in kinds:
                forms = [form == wanted for form in FORMS]
                self._experts[key].append(self._program.add_buffer(width, *forms, times=places))
                self._row_bytes[RowCount.TOKENS] += places * width * FORM_BYTES[FORMS.index(wanted)]
        return self._experts[key]

    def _emit_delta(
        self,
        qkv: int,
        gates: int,
        layer: int,
        heads: DeltaHeads,
        taps: NativeWeight,
        decay: NativeWeight,
        offset: NativeWeight,
        out: int,
    ) -> None:
        if heads not in self._deltas:
            self._deltas[heads] = (self._floats(heads.width), self._floats(2 * heads.value))
        channels, shares = self._deltas[heads]
        self._program.add_delta(
            in_=qkv,
            gates=gates,
            out=out,
            layer=layer,
            taps=taps.address,
            decay=decay.address,
            offset=offset.address,
            channels=channels,
            shares=shares,
        )

    def _emit_short_conv(
        self, x: int, layer: int, heads: DeltaHeads, taps: NativeWeight, out: int
    ) -> None:
        if heads not in self._deltas:
            self._deltas[heads] = (self._floats(heads.width), -1)
        channels, _ = self._deltas[heads]
        self._program.add_short_conv(
            in_=x, out=out, layer=layer, taps=taps.address, channels=channels
        )

    def _floats(self, width: int) -> int:
        """A buffer of plain floats for every token."""
        self._row_bytes[RowCount.TOKENS] += width * FORM_BYTES[0]
        buffer: int = self._program.add_buffer(width, *(form == FORMS[0] for form in FORMS))
        return buffer

    def _emit_gated_norm(
        self, x: int, gate: int, weight: NativeWeight, eps: float, out: int
    ) -> None:
        self._program.add(
            "gated_norm",
            in_=x,
            in2=gate,
            out=out,
            vector=weight.address,
            scalar=eps,
            window=weight.shape[0],
        )

    def _emit_gate(self, x: int, gate: int, activation: str, first: int, out: int) -> None:
        kind = GATE_ACTIVATIONS[activation]
        self._program.add("gate", in_=x, in2=gate, out=out, activation=kind, first=first)

    def _emit_softcap(self, x: int | None, cap: float, out: int | None) -> None:
        assert x is out is None, "both are the logits"
        width = self._logits.shape[1]
        self._program.add("softcap", scalar=cap, window=width, **self._place(None))

    def _emit_sum_parts(self, x: int, parts: int, out: int) -> None:
        self._program.add("sum_parts", in_=x, out=out)

    def _emit_select_rows(self, x: int, out: int) -> None:
        self._program.add("select_rows", in_=x, out=out)


def _at(weight: Any) -> int:
    """A weight's address; 0 of none."""
    return 0 if weight is None else int(weight.address)


def _forms(handle: Handle, tape: Tape) -> tuple[bool, ...]:
    """Which of FORMS a handle's readers want. Raises ValueError if its writer cannot make them."""
    wanted = {_form(i, handle) for i in tape.instructions if handle in i.arguments}
    writer = next(i for i in tape.instructions if handle in i.results)
    if writer.op in NEVER_QUANTIZED and not wanted <= {"floats"}:
        raise ValueError(f"the native kernels cannot quantize what {writer.op} writes")
    if writer.op in FLOAT_WRITERS:
        wanted.add("floats")  # they write floats; some make the others from those
    return tuple(form in wanted for form in FORMS)


def _form(reader: Instruction, handle: Handle) -> str:
    """In which form an instruction wants one of its arguments."""
    if reader.op == "experts" and reader.arguments[0] == handle:
        form: str = reader.arguments[2].reads
        return form
    return reader.arguments[1].reads if reader.op == "linear" else "floats"


def _lazy_floats(rows: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros(rows * width, np.float32)).view(rows, width)
