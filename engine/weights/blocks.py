"""Matrices in ggml's blocks inside safetensors: what `ryzanstein quantize` writes.

A matrix `name` that is quantized as Q4_1 lies in the file as `name.q4_1`, uint8 `[rows, bytes]`, a
row's blocks side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ConfigError

METHOD = "ryzanstein"
SUFFIXES = {".q4_1": "Q4_1", ".q8_0": "Q8_0"}


def plain_name(name: str) -> str:
    """What a stored tensor is called by those who ask for it."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix in blocks of a ggml type, or the part of it within `rows` and `columns` (first,
    behind the last)."""

    name: str
    format: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def block(self) -> int:
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.format]][0]

    def narrow(self, dimension: int, start: int, length: int) -> Self:
        if dimension == 0:
            first = self.rows[0] + start
            return replace(self, rows=(first, first + length))
        assert start % self.block == length % self.block == 0, "a block cannot be cut"
        first = self.columns[0] + start
        return replace(self, columns=(first, first + length))


@dataclass(frozen=True, eq=False)
class BlockTensor(Blocks):
    """Blocks in a memory-mapped file; `stored` is a slice of safetensors."""

    stored: Any

    def packed(self) -> torch.Tensor:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.format]]
        first, last = (column // block * size for column in self.columns)
        part: torch.Tensor = self.stored[self.rows[0] : self.rows[1], first:last]
        return part.contiguous()

    def dense(self) -> torch.Tensor:
        values = dequantize(self.packed().numpy(), GGMLQuantizationType[self.format])
        return torch.from_numpy(values)


def open_blocks(name: str, suffix: str, stored: Any) -> BlockTensor:
    """The matrix that lies in the file as `name` with `suffix`. Raises ConfigError if that is no
    matrix."""
    kind = SUFFIXES[suffix]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    shape, dtype = stored.get_shape(), stored.get_dtype()
    if dtype != "U8" or len(shape) != 2 or shape[1] % size:
        raise ConfigError(f"tensor {name + suffix!r} is {dtype} {shape}, not rows of {kind} blocks")
    return BlockTensor(name, kind, (0, shape[0]), (0, shape[1] // size * block), stored)
