"""What the runner asks of a device: place weights, hold the KV cache, compile and run a tape."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from kernels.batch import Batch, Samples, Sampling
from kernels.ops import Heads, Tape, Weight

DType = Literal["float32", "bfloat16"]
logger = logging.getLogger("ryzanstein.kernels")

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
    max_context: int = 0
    """Positions that a sequence may reach."""

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

    def compile(self, tape: Tape, max_rows: int) -> Program:
        """Make the tape runnable for steps of up to `max_rows` rows."""
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


def select_backend(
    name: str, *, dtype: Literal["auto"] | DType, cache_dtype: Literal["auto"] | DType, threads: int
) -> tuple[Backend, DType]:
    """The named backend, and the dtype that its KV cache takes.

    `native` packs weights and is the fastest, `torch` computes in float32 or bfloat16, `reference`
    is the slow oracle. `auto` is `native` where this machine can, unless float32 is asked for.
    `threads` of 0 means one per core. Raises ValueError if the backend is unknown or cannot serve.
    """
    from kernels.cpu.native_backend import NativeBackend, unavailable_reason
    from kernels.cpu.torch_ops import TorchCpuOps
    from kernels.reference import ReferenceOps
    from kernels.torch_backend import TorchBackend

    threads = threads or available_cores()
    if name == "auto":
        name = "torch" if "float32" in (dtype, cache_dtype) else "native"
        if name == "native" and (reason := unavailable_reason()) is not None:
            logger.warning(
                "the native kernels cannot serve: %s. The torch path does, several times slower.",
                reason,
            )
            name = "torch"
    if name == "native":
        if (reason := unavailable_reason()) is not None:
            raise ValueError(f"the native kernels cannot serve: {reason}")
        if dtype == "float32" or cache_dtype == "float32":
            raise ValueError("the native kernels do not compute in float32; use backend torch")
        # Its threads are its own; torch only samples, and must not compete.
        torch.set_num_threads(1)
        return NativeBackend(dtype, threads), "bfloat16"
    families = {"torch": TorchCpuOps, "reference": ReferenceOps}
    if name not in families:
        known = ", ".join(["auto", "native", *families])
        raise ValueError(f"backend {name!r} is not known; choose one of {known}")
    torch.set_num_threads(threads)
    dense = resolve_dtype(dtype)
    kv_dtype = dense if cache_dtype == "auto" else cache_dtype
    return TorchBackend(name, families[name], dense), kv_dtype
