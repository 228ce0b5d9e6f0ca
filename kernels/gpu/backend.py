"""The GPU backend: weights and the paged cache on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kernels.backend import (
    TORCH_DTYPES,
    CacheDType,
    CacheLayout,
    DType,
    HostTensor,
    PageCodec,
    WeightFormat,
    stacked_name,
)
from kernels.collectives import Collectives
from kernels.gpu.ops import GpuOps
from kernels.gpu.pages import GpuCodec, GpuPages
from kernels.gpu.program import GpuProgram, Limits
from kernels.gpu.recurrence import GpuStateMoves
from kernels.gpu.staging import Staging
from kernels.gpu.weights import column_unit, place
from kernels.gpu.workspace import GpuCache, Workspace
from kernels.ops import Heads, Weight
from kernels.reference import LayerStates
from kernels.tape import Tape

# Rows of a prompt that may be scored in one step beside those that draw (at least a page).
SCORED_ROWS = 64
MAX_HEAD_DIM = 512
# A weight that wants more is not rounded.
MOST_BITS = 8


class GpuWeights:
    """Places weights of one format on `device`; floats are stored in `dtype`."""

    def __init__(
        self, weight_format: WeightFormat, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._format = weight_format
        self._dtype = dtype
        self._device = device
        self._bytes = 0

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        """Place one weight; see `weights.place`."""
        kind = self._format if bits <= MOST_BITS else "bfloat16"
        weight = place(stacked_name(parts), parts, bias, kind, self._dtype, self._device)
        weight = replace(weight, wide=bits > MOST_BITS)
        self._bytes += weight.bytes
        return weight

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        """See `weights.column_unit`."""
        return column_unit(parts, self._format)

    def loaded_bytes(self, *, shared: bool = False) -> int:
        """Bytes of device memory that they occupy."""
        return self._bytes


def widths(heads: Heads) -> tuple[int, ...]:
    """Of what kernels take as one piece: a head, or a latent and the key behind it."""
    return (heads.latent, heads.dim - heads.latent) if heads.latent else (heads.dim,)


class GpuBackend:
    """Places weights on `device`, computes in `dtype`; `invariant` makes every step use one form of
    each kernel, so that results do not depend on the batch."""

    name = "triton"
    latents_once = True

    def __init__(
        self,
        weight_format: WeightFormat,
        dtype: DType,
        device: torch.device,
        *,
        invariant: bool = False,
        capture: bool = True,
        collectives: Collectives | None = None,
    ) -> None:
        self.hardware = "CPU"
        if device.type == "cuda":
            self.hardware = torch.cuda.get_device_name(device)
        self._hopper = True
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            self._hopper = torch.cuda.get_device_capability(device) >= (9, 0)
            # Sums in fp32, rounded once.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._dtype = TORCH_DTYPES[dtype]
        self._device = device
        self._weights = GpuWeights(weight_format, self._dtype, device)
        self._invariant = invariant
        self._capture = capture
        self.collectives = collectives
        self._staging: Staging | None = None
        self._layout: CacheLayout
        self._pages = self._window_pages = 0
        # By whether they are window pages.
        self._tensors: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._caches: list[GpuCache] = []
        self._states: list[LayerStates] = []

    def describe(self) -> str:
        """The device's name and the mode."""
        return f"{self.name} {self.hardware}{' batch-invariant' if self._invariant else ''} kernels"

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        """Place one weight; see `weights.place`."""
        return self._weights.load(parts, bias, bits=bits)

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        """See `weights.column_unit`."""
        return self._weights.column_unit(parts)

    def loaded_bytes(self, *, shared: bool = False) -> int:
        """Bytes of device memory that weights occupy."""
        return self._weights.loaded_bytes()

    def other_weights(
        self, dtype: WeightFormat, packed_file: tuple[Path, str] | None = None
    ) -> GpuWeights:
        """The same weights in another format; floats are stored as this device computes."""
        return GpuWeights(dtype, self._dtype, self._device)

    def free_bytes(self) -> int | None:
        """Bytes of device memory that are free; None without a device."""
        if self._device.type != "cuda":
            return None
        torch.cuda.empty_cache()  # what packing weights took for a moment
        return torch.cuda.mem_get_info(self._device)[0]

    def allocate_cache(
        self, layout: CacheLayout, pages: int, states: int = 0, window_pages: int = 0
    ) -> None:
        """Allocate pages of keys and values, and their scales, for each layer, and states."""
        if layout.dtype == "int4":
            raise ValueError("cache.dtype=int4 takes the native kernels; a GPU serves int8")
        if layout.dtype != "int8" and TORCH_DTYPES[layout.dtype] != self._dtype:
            kept = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[self._dtype]
            raise ValueError(
                f"cache.dtype is {layout.dtype}, but the model computes in {kept}; a GPU takes "
                f"{kept} or int8"
            )
        for dim in {size for heads in layout.heads for size in widths(heads)}:
            if dim > MAX_HEAD_DIM or dim % 8:
                raise ValueError(
                    f"heads are {dim} wide; a multiple of 8 up to {MAX_HEAD_DIM} works"
                )
        self._layout, self._pages, self._staging = layout, pages, None
        self._window_pages = window_pages
        quantized = layout.dtype == "int8"
        dtype = torch.int8 if quantized else TORCH_DTYPES[layout.dtype]
        self._tensors, caches = {False: [], True: []}, dict[int, GpuCache]()
        windowed = layout.sliding if window_pages else frozenset()
        kinds = [(heads, n in windowed) for n, heads in enumerate(layout.heads)]
        for heads, own in dict.fromkeys(kinds):
            layers = [n for n, kind in enumerate(kinds) if kind == (heads, own)]
            # Keys and values of a layer lie behind each other, so that a page is one slice; latents
            # are both.
            each = 1 if heads.latent else 2
            slots = (each * len(layers), self._count(own) * layout.page_size, heads.kv)
            tensors = [torch.zeros(*slots, heads.dim, dtype=dtype, device=self._device)]
            if quantized:
                tensors.append(torch.zeros(slots, dtype=torch.float32, device=self._device))
            parts = [(tensor[0::each], tensor[each - 1 :: each]) for tensor in tensors]
            for row, layer in enumerate(layers):
                halves = [half[row] for pair in parts for half in pair]
                caches[layer] = GpuCache(*halves, windowed=own)
            self._tensors[own] += tensors
        self._caches = [caches[layer] for layer in range(len(layout.heads))]

        self._states = []
        if (delta := layout.delta) is not None:
            shapes = delta.shapes(states)
            self._states = [
                LayerStates(*(torch.zeros(shape, device=self._device) for shape in shapes))
                for _ in range(layout.delta_layers)
            ]

    def states(self) -> GpuStateMoves:
        """The states, to be copied."""
        return GpuStateMoves(self._states)

    def pages(self, *, windowed: bool = False) -> GpuPages:
        """The cache's pages, or its window pages, to be copied and read."""
        return GpuPages(self._tensors[windowed], self._count(windowed))

    def page_codec(self, dtype: CacheDType, *, windowed: bool = False) -> PageCodec:
        """Pages as int8; see `PageCodec`."""
        if dtype != "int8" or self._layout.dtype == "int8":
            raise ValueError(
                f"cache.cold_dtype is {dtype} and the cache {self._layout.dtype}; a GPU makes int8 "
                "of a float cache"
            )
        return GpuCodec(self._tensors[windowed], self._count(windowed), self._device)

    def _count(self, windowed: bool) -> int:
        return self._window_pages if windowed else self._pages

    def compile(self, tape: Tape, max_rows: int, max_sequences: int = 64) -> GpuProgram:
        """Record, warm up and capture for steps of up to `max_rows` rows."""
        layout = self._layout
        width = -(-layout.max_context // layout.page_size)
        trash, window_trash = (self._count(kind) * layout.page_size - 1 for kind in (False, True))
        # One for all programs: what a step draws is the next one's input, whichever runs it.
        if self._staging is None:
            self._staging = Staging(
                max_rows, max_sequences, width, trash, self._device, window_trash
            )
        staging = self._staging
        ops = GpuOps(
            self._caches,
            layout.page_size,
            staging,
            Workspace(self._device, self._hopper),
            self._dtype,
            layout.max_context,
            self._invariant,
            self.collectives,
            self._states,
        )
        samples = min(max_rows, max_sequences + max(SCORED_ROWS, layout.page_size))
        limits = Limits(max_rows, max_sequences, samples)
        return GpuProgram(tape, ops, staging, limits, self._device, capture=self._capture)

    def close(self) -> None:
        """Release the cache."""
        self._states.clear()
        self._tensors.clear()
        self._caches.clear()  # the program's own list, too
