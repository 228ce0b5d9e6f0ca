"""A kernel's launch as data: what runs, or is compiled and checked where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
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
def announce(EARLY: tl.constexpr):
    """If EARLY the next kernel may come (programmatic dependent launch, sm_90)."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """If EARLY this kernel was launched while the one before it runs, and waits for it here."""
    if EARLY:
        gdc_wait()


@triton.jit
def enter(EARLY: tl.constexpr):
    """Every kernel's first words, or second after what no kernel before it writes: see both."""
    announce(EARLY)
    wait(EARLY)


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
        """Run it; `arguments` are the kernel's other ones, in order. Inside `compile_all` it is
        only compiled."""
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


def compile_all(launches: Iterable[Callable[[], None]], at_once: int) -> None:
    """Compile the kernels that these launch, some at once, and run none. Raises what the compiler
    does."""

    def compile_them() -> None:
        _compiling.set(True)
        with ThreadPoolExecutor(at_once) as threads, triton.AsyncCompileMode(threads):
            for launch in launches:
                launch()

    # Triton's mode outlasts an exception, but not its context.
    copy_context().run(compile_them)


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
