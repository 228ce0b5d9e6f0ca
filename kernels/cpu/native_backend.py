"""The native CPU backend: packed weights, and a step as one call that holds no interpreter lock.

Quantized GGUF weights are served in their own bits: Q4_0, Q4_1 and Q8_0 blocks are repacked without
rounding, other quantized types become int8 in groups of 32. Float checkpoints are stored in
bfloat16. Activations are quantized to int8 in groups of 32 in front of quantized weights.
Results do not depend on the batch: every row's sums run in one order.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from kernels.backend import CacheLayout, HostTensor
from kernels.batch import Batch, Samples, Sampling
from kernels.ops import Handle, HeadNorms, Heads, Instruction, Rope, Tape, Weight
from kernels.sampling import Rows, sample

WeightFormat = Literal["auto", "bfloat16"]
GROUP = 32
BLOCKS = {"Q4_0": "pack_q4_0", "Q4_1": "pack_q4_1", "Q8_0": "pack_q8_0"}
FLOATS = ("F32", "F16", "BF16")
PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def native_module() -> ModuleType | None:
    """The compiled kernels, or None where they were not built."""
    try:
        return importlib.import_module("kernels.cpu._native")
    except ModuleNotFoundError:
        return None


def unavailable_reason() -> str | None:
    """Why the native kernels cannot serve on this machine; None if they can."""
    native = native_module()
    if native is None:
        return "they were not built (no C++ compiler at installation, or not x86-64 Linux)"
    if not native.supported():
        return "this CPU lacks AVX512-VNNI and AVX512-BF16"
    return None


@dataclass(frozen=True, eq=False)
class NativeWeight(Weight):
    """A packed matrix with its bias, or a vector; the tensors keep the memory alive."""

    packed: Any = None
    vector: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def address(self) -> int:
        """Of a vector's values."""
        assert self.vector is not None
        return self.vector.data_ptr()

    @property
    def bias_address(self) -> int:
        """Of the bias, or 0."""
        return self.bias.data_ptr() if self.bias is not None else 0


class NativeBackend:
    """Packs weights, owns the paged cache and the threads."""

    name = "native"

    def __init__(self, weight_format: WeightFormat, threads: int) -> None:
        native = native_module()
        assert native is not None, "checked by the caller"
        self._native = native
        self._format = weight_format
        self._pool = native.Pool(threads)
        self._bytes = 0
        self._layout: CacheLayout
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(self, parts: Sequence[HostTensor], bias: Sequence[HostTensor] = ()) -> Weight:
        name = "+".join(part.name for part in parts)
        if len(parts[0].shape) == 1:
            vector = torch.cat([part.dense().float() for part in parts])
            self._bytes += vector.nbytes
            return NativeWeight(name, tuple(vector.shape), vector=vector)
        rows = sum(part.shape[0] for part in parts)
        packed = self._pack(parts, rows, parts[0].shape[1])
        added = torch.cat([b.dense().float() for b in bias]) if bias else None
        self._bytes += packed.bytes + (added.nbytes if added is not None else 0)
        return NativeWeight(name, (rows, parts[0].shape[1]), packed=packed, bias=added)

    def loaded_bytes(self) -> int:
        return self._bytes

    def allocate_cache(self, layout: CacheLayout, pages: int) -> None:
        if layout.page_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"cache.page_size is {layout.page_size}; native kernels take {sizes}")
        if layout.dtype != "bfloat16":
            raise ValueError(f"cache.dtype is {layout.dtype}; native kernels take bfloat16")
        if layout.heads.dim > MAX_HEAD_DIM:
            raise ValueError(f"heads are {layout.heads.dim} wide; at most {MAX_HEAD_DIM} work")
        self._layout = layout
        elements = pages * layout.page_size * layout.heads.kv * layout.heads.dim
        # A register's worth behind the end: the kernels read whole registers.
        self._cache = [
            (_lazy_zeros(elements + GROUP), _lazy_zeros(elements + GROUP))
            for _ in range(layout.layers)
        ]

    def compile(self, tape: Tape, max_rows: int) -> NativeProgram:
        return NativeProgram(self._native, self._pool, tape, max_rows, self._layout, self._cache)

    def close(self) -> None:
        self._cache = []

    def _pack(self, parts: Sequence[HostTensor], rows: int, columns: int) -> Any:
        formats = {part.format for part in parts}
        if self._format == "auto" and len(formats) == 1 and (kind := formats.pop()) in BLOCKS:
            blocks = torch.cat([part.packed() for part in parts]).contiguous()
            return getattr(self._native, BLOCKS[kind])(blocks.data_ptr(), rows, columns)
        quantized = all(part.format not in FLOATS for part in parts)
        values = torch.cat([part.dense().float() for part in parts]).contiguous()
        if self._format == "auto" and quantized and columns % GROUP == 0:
            return self._native.pack_int8(values.data_ptr(), rows, columns)
        return self._native.pack_bf16(values.data_ptr(), rows, columns)


class NativeChooser:
    """Picks tokens of logits rows, rows shared among the pool's threads."""

    def __init__(self, native: ModuleType, pool: Any) -> None:
        self._native = native
        self._pool = pool

    def __call__(self, logits: torch.Tensor, rows: Rows, sampling: Sampling) -> Rows:
        ids = np.empty(len(rows), np.int64)
        self._native.choose(
            self._pool,
            logits.data_ptr(),
            logits.shape[1],
            _address(rows),
            len(rows),
            _address(sampling.temperature),
            _address(sampling.top_k),
            _address(sampling.top_p),
            _address(sampling.min_p),
            _address(sampling.uniform),
            _address(ids),
        )
        return ids


class NativeProgram:
    """A tape turned into native instructions; `forward` is one call."""

    def __init__(
        self,
        native: ModuleType,
        pool: Any,
        tape: Tape,
        max_rows: int,
        layout: CacheLayout,
        cache: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self._choose = NativeChooser(native, pool)
        self._program = native.Program(pool, max_rows)
        self._cache = cache  # the program holds addresses into it
        self._tape = tape  # and into its weights
        self._rotations: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self._logits = _lazy_floats(max_rows, tape.logits.width)
        self._rows = 0
        heads = layout.heads
        for keys, values in cache:
            pages = (keys.data_ptr(), values.data_ptr())
            self._program.add_cache(*pages, layout.page_size, heads.kv, heads.dim)
        self._positions = layout.max_context
        self._build(tape)

    def forward(self, batch: Batch) -> None:
        self._rows = len(batch.sample_rows)
        self._program.run(
            _address(batch.token_ids),
            _address(batch.positions),
            _address(batch.kv_slots),
            _address(batch.query_starts),
            _address(batch.context_lengths),
            _address(batch.table_rows),
            _address(batch.page_table),
            _address(batch.sample_rows),
            len(batch.token_ids),
            len(batch.context_lengths),
            self._rows,
            batch.page_table.shape[1],
        )

    @torch.inference_mode()
    def sample(self, sampling: Sampling) -> Samples:
        return sample(self.logits(), sampling, self._choose)

    def logits(self) -> torch.Tensor:
        return self._logits[: self._rows]

    def profile(self, on: bool) -> None:
        """Start or stop timing instructions; both set the times back to zero."""
        self._program.profile(on)

    def nanoseconds(self) -> dict[str, int]:
        """Time spent in each kind of op since profiling started."""
        times: dict[str, int] = self._program.nanoseconds()
        return times

    def _build(self, tape: Tape) -> None:
        """One call an instruction; a buffer that has been read goes to the next of its kind."""
        kinds = {
            h.index: (h.rows, h.width, *_forms(h, tape))
            for i in tape.instructions
            for h in i.results
        }
        buffers: dict[int, int] = {}
        free: dict[tuple[object, ...], list[int]] = {kind: [] for kind in kinds.values()}
        for instruction, dead in zip(tape.instructions, tape.last_use, strict=True):
            for handle in instruction.results:
                if handle != tape.logits:
                    kind = kinds[handle.index]
                    spare = free[kind]
                    buffers[handle.index] = (
                        spare.pop() if spare else self._program.add_buffer(*kind[1:])
                    )
            emit = getattr(self, f"_emit_{instruction.op}")
            arguments = [
                buffers.get(a.index) if isinstance(a, Handle) else a for a in instruction.arguments
            ]
            emit(*arguments, *(buffers.get(handle.index) for handle in instruction.results))
            for index in dead:
                free[kinds[index]].append(buffers[index])

    def _emit_embed(self, table: NativeWeight, scale: float, out: int) -> None:
        self._program.embed(out, table.packed, scale)

    def _emit_rms_norm(self, x: int, weight: NativeWeight, eps: float, out: int) -> None:
        self._program.rms_norm(x, out, weight.address, eps)

    def _emit_add_rms_norm(
        self, x: int, residual: int, weight: NativeWeight, eps: float, out: int, total: int
    ) -> None:
        self._program.add_rms_norm(x, residual, out, total, weight.address, eps)

    def _emit_linear(self, x: int, weight: NativeWeight, out: int | None) -> None:
        if out is None:
            address = self._logits.data_ptr()
            self._program.logits(x, weight.packed, weight.bias_address, address)
        else:
            self._program.linear(x, out, weight.packed, weight.bias_address)

    def _emit_rope_write_kv(
        self, qkv: int, layer: int, heads: Heads, rope: Rope, norms: HeadNorms | None, out: int
    ) -> None:
        cosine, sine = self._rotation(rope)
        addresses, eps = (0, 0), 0.0
        if norms is not None:
            query, key = norms.query, norms.key
            assert isinstance(query, NativeWeight)
            assert isinstance(key, NativeWeight)
            addresses, eps = (query.address, key.address), norms.eps
        self._program.rope_write_kv(
            qkv, out, layer, heads.query, cosine.data_ptr(), sine.data_ptr(), *addresses, eps
        )

    def _emit_attention(
        self, q: int, layer: int, heads: Heads, scale: float, window: int, out: int
    ) -> None:
        self._program.attention(q, out, layer, heads.query, scale, window)

    def _emit_gated(self, x: int, activation: str, out: int) -> None:
        self._program.gated(x, out, ACTIVATIONS[activation])

    def _emit_select_rows(self, x: int, out: int) -> None:
        self._program.select_rows(x, out)

    def _rotation(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, fp32 `[context, head_dim / 2]`."""
        if rope not in self._rotations:
            frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
            angles = torch.arange(self._positions, dtype=torch.float32)[:, None] * frequencies
            self._rotations[rope] = (angles.cos().contiguous(), angles.sin().contiguous())
        return self._rotations[rope]


def _forms(handle: Handle, tape: Tape) -> tuple[bool, bool, bool]:
    """Whether a handle's readers want it as floats, int8 groups, or bfloat16."""
    readers = [i for i in tape.instructions if handle in i.arguments]
    writer = next(i for i in tape.instructions if handle in i.results)
    wanted = {_form(reader) for reader in readers}
    if writer.op in ("linear", "attention"):
        wanted.add("floats")  # they write floats; what else is wanted is made from those
    return "floats" in wanted, "int8" in wanted, "bf16" in wanted


def _form(reader: Instruction) -> str:
    if reader.op == "linear":
        weight = reader.arguments[1]
        return "bf16" if weight.packed.bf16 else "int8"
    return "bf16" if reader.op == "attention" else "floats"


def _address(array: np.ndarray[Any, Any]) -> int:
    return array.ctypes.data


def _lazy_zeros(elements: int) -> torch.Tensor:
    """bfloat16 zeros, 64-byte aligned, that take memory only once they are written."""
    raw = np.zeros(elements * 2 + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return torch.from_numpy(raw[offset : offset + elements * 2]).view(torch.bfloat16)


def _lazy_floats(rows: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros(rows * width, np.float32)).view(rows, width)
