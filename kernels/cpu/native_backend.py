"""The native CPU backend: packed weights, and a step as one call that holds no interpreter lock.

Quantized GGUF weights are served in their own bits: Q4_0, Q4_1, Q4_K and Q8_0 blocks are repacked
without rounding, other quantized types become int8 in groups of 32. Float checkpoints are stored in
bfloat16, or as asked for; with `int4`, tables and heads are int8. Activations are quantized to int8
in groups of 32 in front of quantized weights, and to int8 rows in front of ternary ones. Results do
not depend on the batch: every row's sums run in one order.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from kernels.backend import (
    CACHE_BITS,
    CacheDType,
    CacheLayout,
    HostTensor,
    TernaryTensor,
    WeightFormat,
    stacked_name,
)
from kernels.collectives import Collectives, SharedMemory
from kernels.cpu.native_program import NativeProgram
from kernels.cpu.packed_file import PackedFile
from kernels.host_pages import HostPages
from kernels.ops import Tape, Weight

# Numbers of the packed formats, as in native/weight.h.
F32, BF16, Q8, Q4, Q4_WIDE, TERNARY = range(6)
GROUP = 32
# ggml's type -> its packed format, and the function that repacks its blocks.
BLOCKS = {
    "Q4_0": (Q4, "pack_q4_0"),
    "Q4_1": (Q4, "pack_q4_1"),
    "Q8_0": (Q8, "pack_q8_0"),
    "Q4_K": (Q4_WIDE, "pack_q4_k"),
}
FLOATS = ("F32", "F16", "BF16")
PACKERS = {F32: "pack_f32", BF16: "pack_bf16", Q8: "pack_int8", Q4: "pack_int4"}
# A weight that wants more bits is not rounded.
FOUR_BITS, MOST_BITS = 4, 8
PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
# Values that are converted at a time.
PACKED_AT_ONCE = 1 << 20
# Weights that took longer to pack are kept for the next start.
WORTH_KEEPING_SECONDS = 0.5
CACHE_FORMATS: dict[CacheDType, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


def native_module() -> ModuleType | None:
    """The compiled kernels, or None where they were not built."""
    try:
        return importlib.import_module("kernels.cpu._native")
    except ModuleNotFoundError:
        return None


def unavailable_reason(instructions: str = "auto") -> str | None:
    """Why the native kernels cannot serve on this machine; None if they can."""
    native = native_module()
    if native is None:
        return "they were not built (no C++ compiler at installation, or not x86-64 Linux)"
    sets = native.instruction_sets()
    if not sets:
        return "this CPU lacks AVX2 with FMA and F16C"
    if instructions not in ("auto", *sets):
        return f"instruction set {instructions!r} is not one that this CPU has: {', '.join(sets)}"
    return None


@dataclass(frozen=True, eq=False)
class NativeWeight(Weight):
    """A packed matrix with its bias, or a vector; the tensors keep the memory alive. A matmul with
    it wants its activations in the form `reads`."""

    packed: Any = None
    reads: str = "floats"
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


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """One layer's paged keys and values, and their scales if they are int8 or int4."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def addresses(self) -> list[int]:
        """In the order of the native cache's arguments; 0 for what is not there."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class NativeCodec:
    """Pages of a native cache in another format; heads share the threads of the device."""

    def __init__(self, codec: Any, memory: list[LayerMemory]) -> None:
        self._codec = codec
        self._memory = memory  # the codec holds addresses into it
        self.page_bytes: int = codec.bytes

    def compress(self, page: int, block: npt.NDArray[np.uint8]) -> None:
        self._codec.compress(page, block.ctypes.data)

    def restore(self, block: npt.NDArray[np.uint8], page: int) -> None:
        self._codec.restore(block.ctypes.data, page)


class NativeBackend:
    """Packs weights, owns the paged cache and the threads."""

    name = "native"
    hardware = "CPU"

    def __init__(
        self,
        weight_format: WeightFormat,
        threads: int,
        instructions: str = "auto",
        packed_file: PackedFile | None = None,
        collectives: SharedMemory | None = None,
    ) -> None:
        native = native_module()
        assert native is not None, "checked by the caller"
        self._native = native
        self._format = weight_format
        self.instructions = instructions
        if instructions == "auto":
            self.instructions = native.instruction_sets()[0]
        self.device = native.Device(self.instructions, threads)
        # Rounded where products take pairs of bfloat16.
        self._pairs = "bf16" if self.device.rounds_pairs else "floats"
        self._packed_file = packed_file
        self.collectives: Collectives | None = collectives
        self._exchange = collectives.exchange if collectives is not None else None
        self._packing_seconds = 0.0
        self._arena = native.Arena()
        self._bytes = 0
        self._layout: CacheLayout
        self._cache: list[LayerMemory] = []

    def describe(self) -> str:
        return f"{self.name} {self.instructions} kernels"

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        name = stacked_name(parts)
        if len(parts[0].shape) == 1:
            vector = torch.cat([part.dense().float() for part in parts])
            self._bytes += vector.nbytes
            return NativeWeight(name, tuple(vector.shape), vector=vector)
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        packed = self._find_or_pack(name, parts, shape, bits)
        added = torch.cat([b.dense().float() for b in bias]) if bias else None
        self._bytes += packed.bytes + (added.nbytes if added is not None else 0)
        reads = {F32: "floats", BF16: self._pairs, TERNARY: "whole"}.get(packed.format, "groups")
        return NativeWeight(name, shape, packed=packed, reads=reads, bias=added)

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        target = self._target(parts)
        unit = {F32: 1, BF16: 2, TERNARY: 0}.get(target, GROUP)
        return math.lcm(unit, *(part.block for part in parts)) or None

    def loaded_bytes(self) -> int:
        return self._bytes

    def allocate_cache(self, layout: CacheLayout, pages: int) -> None:
        if layout.page_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"cache.page_size is {layout.page_size}; native kernels take {sizes}")
        if layout.heads.dim > MAX_HEAD_DIM or layout.heads.dim % 4:
            raise ValueError(
                f"heads are {layout.heads.dim} wide; a multiple of 4 up to {MAX_HEAD_DIM} works"
            )
        if layout.dtype == "int4" and layout.heads.dim % GROUP:
            raise ValueError(
                f"heads are {layout.heads.dim} wide; cache.dtype=int4 takes multiples of {GROUP}"
            )
        self._layout = layout
        vectors = pages * layout.page_size * layout.heads.kv
        # A register's worth behind the end: the kernels read whole registers.
        size = vectors * layout.vector_bytes + 64
        scales = vectors * layout.scale_bytes
        self._cache = [
            LayerMemory(
                _lazy_zeros(size),
                _lazy_zeros(size),
                _lazy_zeros(scales) if scales else None,
                _lazy_zeros(scales) if scales else None,
            )
            for _ in range(layout.layers)
        ]

    def free_bytes(self) -> int | None:
        return None

    def pages(self) -> HostPages:
        return HostPages(self.cache_parts())

    def cache_parts(self) -> list[npt.NDArray[np.uint8]]:
        """The cache as it lies in memory, see `HostPages`."""
        layout = self._layout
        vectors = layout.page_size * layout.heads.kv
        element, scale = vectors * layout.vector_bytes, vectors * layout.scale_bytes
        parts = []
        for layer in self._cache:
            for tensor, size in (
                (layer.keys, element),
                (layer.values, element),
                (layer.key_scales, scale),
                (layer.value_scales, scale),
            ):
                if tensor is not None:
                    pages = tensor.numel() // size
                    parts.append(tensor.numpy()[: pages * size].reshape(pages, size))
        return parts

    def page_codec(self, dtype: CacheDType) -> NativeCodec:
        stored = self._layout.dtype
        if CACHE_BITS[dtype] >= CACHE_BITS[stored]:
            raise ValueError(f"cache.cold_dtype is {dtype}, but the cache itself is {stored}")
        if dtype == "int4" and self._layout.heads.dim % GROUP:
            raise ValueError(f"cache.cold_dtype=int4 takes heads of multiples of {GROUP}")
        layers = [self._native_cache(layer) for layer in self._cache]
        codec = self._native.PageCodec(self.device, layers, CACHE_FORMATS[dtype])
        return NativeCodec(codec, self._cache)

    def compile(self, tape: Tape, max_rows: int, max_sequences: int = 64) -> NativeProgram:
        if self._packed_file is not None and self._packing_seconds > WORTH_KEEPING_SECONDS:
            self._packed_file.save()
        layout = self._layout
        program = NativeProgram(
            self._native, self.device, tape, max_rows, layout.max_context, self._exchange
        )
        for layer in self._cache:
            program.add_cache(layer, self._native_cache(layer))
        return program

    def _native_cache(self, layer: LayerMemory) -> Any:
        layout = self._layout
        return self._native.LayerCache(
            CACHE_FORMATS[layout.dtype],
            *layer.addresses(),
            layout.page_size,
            layout.heads.kv,
            layout.heads.dim,
        )

    def close(self) -> None:
        self._cache = []

    def _find_or_pack(
        self, name: str, parts: Sequence[HostTensor], shape: tuple[int, int], bits: int
    ) -> Any:
        """The packed weight, from the file of an earlier start if it is there."""
        packed = self._native.make_weight(self._arena, self._target(parts, bits), *shape)
        file = self._packed_file
        if file is not None and file.copy(name, packed, *shape):
            return packed
        start, first = time.perf_counter(), 0
        for part in parts:
            self._pack(packed, first, part)
            first += part.shape[0]
        self._packing_seconds += time.perf_counter() - start
        if file is not None:
            file.collect(name, packed, *shape)
        return packed

    def _target(self, parts: Sequence[HostTensor], bits: int = 4) -> int:
        """The packed format that these parts take together."""
        formats = {part.format for part in parts}
        columns = parts[0].shape[1]
        if formats == {"TERNARY"}:
            return TERNARY
        if self._format == "float32":
            return F32
        floats = BF16 if columns % 2 == 0 else F32
        if self._format == "bfloat16" or columns % GROUP or bits > MOST_BITS:
            return floats
        if self._format == "int8":
            return Q8
        targets = {BLOCKS[kind][0] if kind in BLOCKS else None for kind in formats}
        if self._format == "int4" and targets not in ({Q4}, {Q4_WIDE}):
            return Q4 if bits <= FOUR_BITS else Q8
        if len(targets) == 1 and (target := targets.pop()) is not None:
            return target
        return floats if formats & set(FLOATS) else Q8

    def _pack(self, packed: Any, first: int, part: HostTensor) -> None:
        """A few rows at a time, so that hardly more memory is taken than the packed weight's."""
        rows, columns = part.shape
        step = max(1, PACKED_AT_ONCE // columns)
        for start in range(0, rows, step):
            piece = part.narrow(0, start, min(step, rows - start))
            self._pack_rows(packed, first + start, piece)

    def _pack_rows(self, packed: Any, first: int, part: HostTensor) -> None:
        rows = part.shape[0]
        if packed.format == TERNARY:
            ternary = cast("TernaryTensor", part)
            signs = ternary.signs().contiguous()
            self._native.pack_ternary(packed, first, signs.data_ptr(), rows, ternary.scale)
            return
        kind = BLOCKS.get(part.format)
        if kind is not None and kind[0] == packed.format:
            blocks = part.packed().contiguous()
            getattr(self._native, kind[1])(packed, first, blocks.data_ptr(), rows)
            return
        values = part.dense().float().contiguous()
        pack = PACKERS[packed.format]
        getattr(self._native, pack)(packed, first, values.data_ptr(), rows)


def _lazy_zeros(size: int) -> torch.Tensor:
    """Zeroed bytes, 64-byte aligned, that take memory only once they are written."""
    raw = np.zeros(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return torch.from_numpy(raw[offset : offset + size])
