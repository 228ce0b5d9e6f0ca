"""Matrices of every kind for the GPU kernels' checks: as a checkpoint has them, and in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels.gpu.matmul import FOUR_BITS
from kernels.gpu.weights import GpuWeight, unpack_nibbles

# What nibbles of MXFP4 stand for.
FLOAT4 = torch.tensor([s * m for s in (1.0, -1.0) for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]).double()


@dataclass(frozen=True, eq=False)
class Matrix:
    """A float matrix as a checkpoint's tensor."""

    values: torch.Tensor
    name: str = "random"
    format: str = "BF16"
    block: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def narrow(self, dimension: int, start: int, length: int) -> Matrix:
        return replace(self, values=self.values.narrow(dimension, start, length))

    def dense(self) -> torch.Tensor:
        return self.values

    def packed(self) -> torch.Tensor:
        raise ValueError("not in blocks")


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix of GGUF's Q4_1, Q8_0 or MXFP4 with random numbers, as a checkpoint's tensor."""

    format: str
    shape: tuple[int, ...]
    name: str = "random"
    block: int = 32

    def dense(self) -> torch.Tensor:
        raise ValueError("it is in blocks")

    def packed(self) -> torch.Tensor:
        size = (self.shape[0], self.shape[1] // self.block)
        halves, rest = (2, 16) if self.format == "Q4_1" else (1, 32)
        factors = (torch.rand(*size, halves) * 0.01).half().view(torch.uint8)
        if self.format == "MXFP4":
            factors, rest = torch.randint(118, 124, (*size, 1), dtype=torch.uint8), 16
        numbers = torch.randint(0, 256, (*size, rest), dtype=torch.uint8)
        return torch.cat([factors, numbers], -1).view(size[0], -1)

    def narrow(self, dimension: int, start: int, length: int) -> Blocks:
        raise ValueError("it stays whole")


def dense_of(weight: GpuWeight) -> torch.Tensor:
    """The values that a placed weight stands for, float64 `[out, in]`."""
    columns = weight.shape[1]
    tensor = weight.tensor
    if weight.format == "float":
        return tensor.double()
    assert weight.scales is not None
    if weight.format == "int8":
        return tensor.double() * weight.scales.double()[:, None]
    if weight.format in FOUR_BITS:
        tensor = unpack_nibbles(tensor, columns)
    if weight.format == "float4":
        assert weight.scales is not None
        steps = weight.scales.double().repeat_interleave(weight.group, 1)[:, :columns]
        return FLOAT4.to(tensor.device)[tensor.long()] * steps
    assert weight.lows is not None
    scale, low = (
        t.double().repeat_interleave(weight.group, 1)[:, :columns]
        for t in (weight.scales, weight.lows)
    )
    return (tensor.double() + 128 + low) * scale if weight.zeros else tensor.double() * scale + low
