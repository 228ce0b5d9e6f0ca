"""Tensors seen otherwise than they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kernels.backend import HostTensor


@dataclass(frozen=True, eq=False)
class View:
    """A tensor by another tensor's name and format."""

    tensor: HostTensor

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def format(self) -> str:
        return self.tensor.format

    @property
    def block(self) -> int:
        return self.tensor.block

    def narrow(self, dimension: int, start: int, length: int) -> HostTensor:
        return replace(self, tensor=self.tensor.narrow(dimension, start, length))

    def dense(self) -> torch.Tensor:
        return self.tensor.dense()

    def packed(self) -> torch.Tensor:
        return self.tensor.packed()


@dataclass(frozen=True, eq=False)
class Renamed(View):
    """A tensor, or a part of one, under a name of its own."""

    own_name: str

    @property
    def name(self) -> str:
        return self.own_name


@dataclass(frozen=True, eq=False)
class Flat(View):
    """A tensor's values as a vector."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.tensor.shape),)

    def narrow(self, dimension: int, start: int, length: int) -> HostTensor:
        raise ValueError(f"{self.name} stays whole")

    def dense(self) -> torch.Tensor:
        return self.tensor.dense().flatten()


@dataclass(frozen=True, eq=False)
class Row(View):
    """A vector as a matrix of one row."""

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, *self.tensor.shape

    def narrow(self, dimension: int, start: int, length: int) -> HostTensor:
        raise ValueError(f"{self.name} stays whole")

    def dense(self) -> torch.Tensor:
        return self.tensor.dense()[None]


@dataclass(frozen=True, eq=False)
class Computed(View):
    """A vector of `length` numbers that are a function of a tensor's."""

    function: Callable[[torch.Tensor], torch.Tensor]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def format(self) -> str:
        return "F32"

    def narrow(self, dimension: int, start: int, length: int) -> HostTensor:
        raise ValueError(f"{self.name} stays whole")

    def dense(self) -> torch.Tensor:
        return self.function(self.tensor.dense().float())


@dataclass(frozen=True, eq=False)
class Turned(View):
    """A matrix of `blocks` blocks of rows, `[blocks * n, columns]`, each of them transposed:
    `[blocks * columns, n]`; of those the rows in `part`: the first, and how many."""

    blocks: int
    part: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.tensor.shape
        return self.part[1] if self.part else self.blocks * columns, rows // self.blocks

    @property
    def format(self) -> str:
        return "F32"

    def narrow(self, dimension: int, start: int, length: int) -> HostTensor:
        if dimension or self.part:
            raise ValueError(f"{self.name} is cut by rows, once")
        return replace(self, part=(start, length))

    def dense(self) -> torch.Tensor:
        rows, columns = self.tensor.shape
        start, length = self.part or (0, self.blocks * columns)
        height, first, last = rows // self.blocks, start // columns, -(-(start + length) // columns)
        needed = self.tensor.narrow(0, first * height, (last - first) * height).dense().float()
        turned = needed.view(last - first, height, columns).transpose(1, 2).reshape(-1, height)
        return turned[start - first * columns :][:length]


@dataclass(frozen=True, eq=False)
class Adjusted(View):
    """A tensor with every value multiplied by `factor`, and `offset` added."""

    factor: float = 1.0
    offset: float = 0.0

    @property
    def format(self) -> str:
        return "F32"

    def dense(self) -> torch.Tensor:
        return self.tensor.dense().float() * self.factor + self.offset


@dataclass(frozen=True, eq=False)
class Reordered(View):
    """A tensor of which row n is the stored row `order[n]`, int64 `[rows]`."""

    order: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.order), *self.tensor.shape[1:]

    def narrow(self, dimension: int, start: int, length: int) -> Reordered:
        if dimension == 0:
            return Reordered(self.tensor, self.order[start : start + length])
        return Reordered(self.tensor.narrow(dimension, start, length), self.order)

    def dense(self) -> torch.Tensor:
        tensor, order = self._reached()
        return tensor.dense()[order]

    def packed(self) -> torch.Tensor:
        tensor, order = self._reached()
        return tensor.packed()[order]

    def _reached(self) -> tuple[HostTensor, torch.Tensor]:
        """The stored rows from the first to the last one that is needed, and their order."""
        first, last = int(self.order.min()), int(self.order.max())
        return self.tensor.narrow(0, first, last + 1 - first), self.order - first
