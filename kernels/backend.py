"""What the runner asks of a device: place weights, hold the KV cache, compile and run a tape."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from kernels.batch import Batch, Samples, Sampling
from kernels.ops import Heads, Tape, Weight

DType = Literal["float32", "bfloat16"]
TORCH_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HostTensor(Protocol):
    """A tensor of a checkpoint, still on the host and usually memory-mapped."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> str:
        """The stored format's name: `F32`, `F16`, `BF16`, or a ggml type such as `Q4_1`."""
        ...

    def dense(self) -> torch.Tensor:
        """The values as a float tensor (fp32, fp16 or bf16 as stored; fp32 if quantized)."""
        ...

    def packed(self) -> torch.Tensor:
        """Quantized blocks as stored: uint8 `[rows, bytes per row]`. Only for block formats."""
        ...


@dataclass(frozen=True)
class CacheLayout:
    """The shape of a paged KV cache: layers x pages x page_size tokens x kv heads x head_dim."""

    layers: int
    heads: Heads
    page_size: int
    dtype: DType

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        item = TORCH_DTYPES[self.dtype].itemsize
        return 2 * self.layers * self.page_size * self.heads.kv * self.heads.dim * item


class Program(Protocol):
    """A compiled tape: `forward` and `sample` are separate, so that masks can come between."""

    def forward(self, batch: Batch) -> None:
        """Compute the logits of the batch's sampled rows and keep them."""
        ...

    def sample(self, sampling: Sampling) -> Samples:
        """Draw a token for each row of the kept logits."""
        ...

    def logits(self) -> torch.Tensor:
        """The kept logits, fp32 `[samples, vocab]` (for tests and quality measurements)."""
        ...


class Backend(Protocol):
    """One device. `load` is called for every weight before `compile`."""

    name: str

    def load(self, parts: Sequence[HostTensor], bias: Sequence[HostTensor] = ()) -> Weight:
        """Place one weight, its parts stacked along the output dimension, with its bias."""
        ...

    def loaded_bytes(self) -> int:
        """Bytes that the placed weights occupy."""
        ...

    def allocate_cache(self, layout: CacheLayout, pages: int) -> None:
        """Allocate the paged KV cache."""
        ...

    def compile(self, tape: Tape) -> Program:
        """Make the tape runnable."""
        ...

    def close(self) -> None:
        """Release what the device holds."""
        ...


def supports_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512_BF16 or AMX); without, fp32 is faster."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_dtype(name: Literal["auto"] | DType) -> DType:
    """`auto` is bf16 where the CPU computes in it, else fp32."""
    if name == "auto":
        return "bfloat16" if supports_bfloat16() else "float32"
    return name


def select_backend(name: str, *, dtype: DType, threads: int) -> Backend:
    """Make the named backend: `torch` (the default on a CPU) or `reference` (the slow oracle).

    `threads` of 0 means one per core. Raises ValueError for an unknown name.
    """
    from kernels.cpu.torch_ops import TorchCpuOps
    from kernels.reference import ReferenceOps
    from kernels.torch_backend import TorchBackend

    families = {"torch": TorchCpuOps, "reference": ReferenceOps}
    chosen = "torch" if name == "auto" else name
    if chosen not in families:
        known = ", ".join(["auto", *families])
        raise ValueError(f"backend {name!r} is not known; choose one of {known}")
    torch.set_num_threads(threads or available_cores())
    return TorchBackend(chosen, families[chosen], dtype)
