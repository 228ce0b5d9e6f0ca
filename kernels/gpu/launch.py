"""A kernel's launch as data: what runs, or is compiled and checked where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TRITON_TYPES: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@triton.jit
def enter(EARLY: tl.constexpr):
    """Every kernel's first words, or second after what no kernel before it writes.

    If EARLY it was launched while the one before it still runs, and waits for it here; the next may
    already come (programmatic dependent launch, sm_90).
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@dataclass(frozen=True)
class Config:
    """A kernel with everything that is fixed when it is compiled.

    `constants` are its `tl.constexpr` arguments; `warps` and `stages` are of 32 threads and of the
    software pipeline.
    """

    kernel: Any
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run it; `arguments` are the kernel's other ones, in order. Inside `compiling` it is only
        compiled."""
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        early = early_launches(arguments[0].device)
        if early:
            options["launch_pdl"] = True
        self.kernel.run(
            *arguments, grid=grid, warmup=_compiling.get(), **self.constants, EARLY=early, **options
        )


@dataclass(frozen=True)
class Compiled:
    """A `Config` and the types of its other arguments, as the compiler wants them."""

    label: str
    config: Config
    signature: Mapping[str, str]
    aligned: tuple[str, ...] = field(default=())
    """Integer arguments that are multiples of 16; pointers always are."""


_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def compiling() -> Iterator[None]:
    """Launches inside compile their kernels, as many at once as there are cores, and run nothing;
    at the end all are there. Raises what the compiler does."""
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)


@cache
def early_launches(device: torch.device) -> bool:
    """Whether a kernel can be launched there while the one before it runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pointer(dtype: torch.dtype) -> str:
    """The compiler's name of a pointer to elements of `dtype`."""
    return "*" + TRITON_TYPES[dtype]


def power_of_two(value: int) -> int:
    """The least power of two that is not below `value`."""
    return int(triton.next_power_of_2(value))
