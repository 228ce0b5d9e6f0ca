"""A backend on torch tensors: weights made dense, a tape replayed op by op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch

from kernels.backend import (
    TORCH_DTYPES,
    CacheDType,
    CacheLayout,
    DType,
    HostTensor,
    PageCodec,
    TernaryTensor,
    WeightFormat,
    stacked_name,
)
from kernels.batch import Batch, Samples, Sampling
from kernels.collectives import Collectives
from kernels.host_pages import HostPages
from kernels.ops import Weight
from kernels.reference import LayerCache, LayerStates, ReferenceOps, TorchWeight
from kernels.sampling import sample
from kernels.tape import Tape


class TorchBackend:
    """Runs tapes with the given ops class; matrices are stored in `dtype`, vectors in fp32."""

    latents_once = False

    def __init__(
        self,
        name: str,
        ops_class: type[ReferenceOps],
        dtype: DType,
        collectives: Collectives | None = None,
    ) -> None:
        self.name = name
        self.collectives = collectives
        self.hardware = "CPU"
        self._ops_class = ops_class
        self._dtype = TORCH_DTYPES[dtype]
        self._bytes = 0
        self._caches: list[LayerCache] = []
        self._states: list[LayerStates] = []
        self._page_size = 0

    def describe(self) -> str:
        return f"{self.name} kernels"

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        scales = None
        if all(part.format == "TERNARY" for part in parts):
            ternary = [cast("TernaryTensor", part) for part in parts]
            tensor = torch.cat([part.signs() for part in ternary])
            scales = torch.cat([torch.full((part.shape[0],), part.scale) for part in ternary])
        else:
            tensor = self._stack(parts)
        dtype = tensor.dtype if scales is None else torch.float32
        added = self._stack(bias).to(dtype) if bias else None
        self._bytes += tensor.nbytes + (added.nbytes if added is not None else 0)
        name = stacked_name(parts)
        return TorchWeight(name, tuple(tensor.shape), tensor, added, scales)

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        return None if parts[0].format == "TERNARY" else parts[0].block

    def loaded_bytes(self, *, shared: bool = False) -> int:
        return self._bytes

    def other_weights(
        self, dtype: WeightFormat, packed_file: tuple[Path, str] | None = None
    ) -> NoReturn:
        raise ValueError(
            f"backend {self.name} computes in one format; none leaves {dtype} out, and the native "
            "kernels or a GPU take it"
        )

    def allocate_cache(
        self, layout: CacheLayout, pages: int, states: int = 0, window_pages: int = 0
    ) -> None:
        dtype = TORCH_DTYPES[layout.dtype]
        self._page_size, self._caches = layout.page_size, []
        for layer, heads in enumerate(layout.heads):
            windowed = window_pages > 0 and layer in layout.sliding
            slots = (window_pages if windowed else pages) * layout.page_size
            shape = (slots, heads.kv, heads.dim)
            keys, values = (_lazy_zeros(shape, dtype) for _ in range(2))
            self._caches.append(LayerCache(keys, values, windowed))
        self._states = host_states(layout, states)

    def states(self) -> HostPages:
        return states_of(self._states)

    def free_bytes(self) -> int | None:
        return None

    def cache_parts(self, *, windowed: bool = False) -> list[npt.NDArray[np.uint8]]:
        """The cache's pages as they lie in memory, see `HostPages`."""
        caches = [cache for cache in self._caches if cache.windowed is windowed]
        tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        flat = [tensor.view(-1).view(torch.uint8).numpy() for tensor in tensors]
        size = self._page_size
        return [
            part.reshape(len(tensor) // size, -1)
            for part, tensor in zip(flat, tensors, strict=True)
        ]

    def pages(self, *, windowed: bool = False) -> HostPages:
        return HostPages(self.cache_parts(windowed=windowed))

    def page_codec(self, dtype: CacheDType, *, windowed: bool = False) -> PageCodec:
        raise ValueError(f"cache.cold_dtype={dtype} takes the native kernels; {self.name} has none")

    def compile(self, tape: Tape, max_rows: int, max_sequences: int = 64) -> TorchProgram:
        return TorchProgram(tape, self.ops())

    def ops(self) -> ReferenceOps:
        """Ops on the allocated cache."""
        return self._ops_class(self._caches, self._page_size, self.collectives, self._states)

    def close(self) -> None:
        self._caches, self._states = [], []

    def _stack(self, parts: Sequence[HostTensor]) -> torch.Tensor:
        dense = [part.dense() for part in parts]
        dtype = self._dtype if dense[0].dim() > 1 else torch.float32
        if len(dense) == 1:
            return dense[0].to(dtype).contiguous()
        return torch.cat([d.to(dtype) for d in dense])


def host_states(layout: CacheLayout, states: int) -> list[LayerStates]:
    """Room for so many states in every layer that keeps them."""
    heads = layout.delta
    if heads is None:
        return []
    shapes = heads.shapes(states)
    return [
        LayerStates(*(_lazy_zeros(shape, torch.float32) for shape in shapes))
        for _ in range(layout.delta_layers)
    ]


def states_of(layers: Sequence[LayerStates]) -> HostPages:
    """States in host memory, as they are moved."""
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    return HostPages([tensor.flatten(1).view(torch.uint8).numpy() for tensor in tensors])


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory the system hands out page by page as it is first written.

    Zeros, since padded attention reads slot 0 and 0 * NaN would spread.
    """
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class TorchProgram:
    """A tape and the ops that replay it."""

    def __init__(self, tape: Tape, ops: ReferenceOps) -> None:
        self._tape = tape
        self._ops = ops
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        self._ops.begin(batch)
        self._logits = self._tape.replay(self._ops)

    @torch.inference_mode()
    def sample(self, sampling: Sampling) -> Samples:
        return sample(self._logits, sampling)

    def buffer_bytes(self, sampled_rows: int) -> int:
        return sampled_rows * self._tape.logits.width * 4  # activations come and go

    def logits(self) -> torch.Tensor:
        return self._logits
