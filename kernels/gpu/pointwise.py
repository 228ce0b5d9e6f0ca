"""Ops that take each value by itself: sums, gates and capped logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.configs import blocks_of
from kernels.gpu.fused import active
from kernels.gpu.launch import Config, enter
from kernels.ops import GateActivation

MAX_BLOCK = 1024


@triton.jit
def sigmoid(x):
    """As `torch.sigmoid`; far below zero exp is infinite, and its inverse 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def add_kernel(out, x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The sum of two rows."""
    enter(EARLY)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    out,
    x,
    gate,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """WIDTH values of a row of STRIDE, from FIRST on, times an activation of its gate."""
    enter(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * STRIDE + FIRST + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(gate + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "sigmoid":
        value *= sigmoid(by)
    else:
        value *= active(by, ACTIVATION)
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def softcap_kernel(x, cap, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Rows of logits under a cap, in place."""
    enter(EARLY)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = x + tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(place, mask=inside, other=0.0)
    # tanh(u) = 2 sigmoid(2u) - 1
    tl.store(place, cap * (2.0 * sigmoid(2.0 * value / cap) - 1.0), mask=inside)


def add_config(width: int) -> tuple[Config, int]:
    """A sum of rows of this width, and the blocks of a row."""
    block, count = blocks_of(width, MAX_BLOCK)
    return Config(add_kernel, {"WIDTH": width, "BLOCK": block}, 4), count


def gate_config(
    width: int, stride: int, first: int, activation: GateActivation
) -> tuple[Config, int]:
    """A gate of this width over rows of `stride`, and the blocks of a row."""
    block, count = blocks_of(width, MAX_BLOCK)
    sizes = {"WIDTH": width, "STRIDE": stride, "FIRST": first, "BLOCK": block}
    return Config(gate_kernel, {**sizes, "ACTIVATION": activation}, 4), count


def softcap_config(width: int) -> tuple[Config, int]:
    """Logits of a vocabulary of this width, and the blocks of a row."""
    block, count = blocks_of(width, MAX_BLOCK)
    return Config(softcap_kernel, {"WIDTH": width, "BLOCK": block}, 4), count


class PointwiseOps:
    """Those ops of the protocol."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        config, blocks = add_config(x.shape[1])
        config.launch((len(x), blocks), out, x, y)
        return out

    def gate(
        self, x: torch.Tensor, gate: torch.Tensor, activation: GateActivation, first: int = 0
    ) -> torch.Tensor:
        out = torch.empty_like(gate)
        config, blocks = gate_config(gate.shape[1], x.shape[1], first, activation)
        config.launch((len(x), blocks), out, x, gate)
        return out

    def softcap(self, logits: torch.Tensor, cap: float) -> torch.Tensor:
        assert logits.dtype == torch.float32, "logits are made where they are kept"
        config, blocks = softcap_config(logits.shape[1])
        config.launch((len(logits), blocks), logits, cap)
        return logits
