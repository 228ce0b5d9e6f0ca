"""The native CPU backend: packed weights, and a step as one call that holds no interpreter lock.

Activations are quantized to int8 in groups of 32 in front of quantized weights, and to int8 rows in
front of ternary ones. Results do not depend on the batch: every row's sums run in one order.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.backend import CACHE_BITS, CacheDType, CacheLayout, HostTensor, WeightFormat
from kernels.collectives import Collectives, SharedMemory
from kernels.cpu.native_program import NativeProgram
from kernels.cpu.native_weights import GROUP, NativeWeights
from kernels.cpu.packed_file import PackedFile
from kernels.host_pages import HostPages
from kernels.ops import Heads, Weight
from kernels.reference import LayerStates
from kernels.tape import Tape
from kernels.torch_backend import host_states, states_of

PAGE_SIZES = (16, 32, 64, 128, 256)
# Latents of 512, and a key of 64 that all heads share.
MAX_HEAD_DIM = 576
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
    latents_once = False

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
        self.instructions = instructions
        if instructions == "auto":
            self.instructions = native.instruction_sets()[0]
        self.device = native.Device(self.instructions, threads)
        self._weights: list[NativeWeights] = []
        self._place(weight_format, packed_file)
        self.collectives: Collectives | None = collectives
        self._exchange = collectives.exchange if collectives is not None else None
        self._layout: CacheLayout
        self._cache: list[LayerMemory] = []
        self._windowed = frozenset[int]()
        self._states: list[LayerStates] = []

    def describe(self) -> str:
        return f"{self.name} {self.instructions} kernels"

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        return self._weights[0].load(parts, bias, bits=bits)

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        return self._weights[0].column_unit(parts)

    def loaded_bytes(self, *, shared: bool = False) -> int:
        return self._weights[0].loaded_bytes()

    def other_weights(
        self, dtype: WeightFormat, packed_file: tuple[Path, str] | None = None
    ) -> NativeWeights:
        packed = PackedFile(*packed_file) if packed_file is not None else None
        return self._place(dtype, packed)

    def allocate_cache(
        self, layout: CacheLayout, pages: int, states: int = 0, window_pages: int = 0
    ) -> None:
        if layout.page_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"cache.page_size is {layout.page_size}; native kernels take {sizes}")
        for dim in {heads.dim for heads in layout.heads}:
            if dim > MAX_HEAD_DIM or dim % 4:
                raise ValueError(
                    f"heads are {dim} wide; a multiple of 4 up to {MAX_HEAD_DIM} works"
                )
            if layout.dtype == "int4" and dim % GROUP:
                raise ValueError(
                    f"heads are {dim} wide; cache.dtype=int4 takes multiples of {GROUP}"
                )
        self._layout = layout
        self._windowed = layout.sliding if window_pages else frozenset()
        self._cache = [
            self._layer_memory(heads, window_pages if layer in self._windowed else pages)
            for layer, heads in enumerate(layout.heads)
        ]
        self._states = host_states(layout, states)

    def _layer_memory(self, heads: Heads, pages: int) -> LayerMemory:
        layout = self._layout
        vectors = pages * layout.page_size * heads.kv
        # A register's worth behind the end: the kernels read whole registers.
        size = vectors * layout.vector_bytes(heads) + 64
        scales = vectors * layout.scale_bytes(heads)
        return LayerMemory(
            _lazy_zeros(size),
            _lazy_zeros(size),
            _lazy_zeros(scales) if scales else None,
            _lazy_zeros(scales) if scales else None,
        )

    def states(self) -> HostPages:
        return states_of(self._states)

    def free_bytes(self) -> int | None:
        return None

    def pages(self, *, windowed: bool = False) -> HostPages:
        return HostPages(self.cache_parts(windowed=windowed))

    def cache_parts(self, *, windowed: bool = False) -> list[npt.NDArray[np.uint8]]:
        """The cache's pages as they lie in memory, see `HostPages`."""
        layout = self._layout
        parts = []
        for number in self._layers(windowed):
            layer, heads = self._cache[number], layout.heads[number]
            vectors = layout.page_size * heads.kv
            element, scale = (
                vectors * layout.vector_bytes(heads),
                vectors * layout.scale_bytes(heads),
            )
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

    def page_codec(self, dtype: CacheDType, *, windowed: bool = False) -> NativeCodec:
        stored = self._layout.dtype
        if CACHE_BITS[dtype] >= CACHE_BITS[stored]:
            raise ValueError(f"cache.cold_dtype is {dtype}, but the cache itself is {stored}")
        if dtype == "int4" and any(heads.dim % GROUP for heads in self._layout.heads):
            raise ValueError(f"cache.cold_dtype=int4 takes heads of multiples of {GROUP}")
        caches = self._native_caches()
        layers = [caches[number] for number in self._layers(windowed)]
        codec = self._native.PageCodec(self.device, layers, CACHE_FORMATS[dtype])
        return NativeCodec(codec, self._cache)

    def compile(self, tape: Tape, max_rows: int, max_sequences: int = 64) -> NativeProgram:
        for weights in self._weights:
            weights.keep()
        layout = self._layout
        program = NativeProgram(
            self._native, self.device, tape, max_rows, layout.max_context, self._exchange
        )
        for layer, cache in zip(self._cache, self._native_caches(), strict=True):
            program.add_cache(layer, cache)
        for states in self._states:
            program.add_states(states, self._native_states(states))
        return program

    def _place(self, dtype: WeightFormat, packed_file: PackedFile | None) -> NativeWeights:
        # Pairs of bfloat16 are rounded where products take them.
        pairs = self.device.rounds_pairs
        weights = NativeWeights(
            self._native,
            dtype,
            rounds_pairs=pairs,
            packed_file=packed_file,
            beside=self._weights[0] if self._weights else None,
        )
        self._weights.append(weights)
        return weights

    def _layers(self, windowed: bool) -> list[int]:
        """Those with window pages of their own, or the others."""
        return [n for n in range(len(self._cache)) if (n in self._windowed) is windowed]

    def _native_caches(self) -> list[Any]:
        layout = self._layout
        return [
            self._native.LayerCache(
                CACHE_FORMATS[layout.dtype],
                *layer.addresses(),
                layout.page_size,
                heads.kv,
                heads.dim,
                number in self._windowed,
            )
            for number, (layer, heads) in enumerate(zip(self._cache, layout.heads, strict=True))
        ]

    def _native_states(self, states: LayerStates) -> Any:
        heads = self._layout.delta
        assert heads is not None
        return self._native.LayerStates(
            states.inputs.data_ptr(),
            states.memory.data_ptr(),
            heads.taps,
            heads.key,
            heads.value,
            heads.key_dim,
            heads.value_dim,
            heads.tiled,
        )

    def close(self) -> None:
        self._cache, self._states = [], []


def _lazy_zeros(size: int) -> torch.Tensor:
    """Zeroed bytes, 64-byte aligned, that take memory only once they are written."""
    raw = np.zeros(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return torch.from_numpy(raw[offset : offset + size])
