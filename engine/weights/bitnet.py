"""BitNet b1.58 weights (arXiv 2402.17764) in the layouts that Hugging Face checkpoints have.

A linear's values are signs times one scale. Published checkpoints pack the signs: a byte of row r
holds those of rows r, r + n, r + 2n and r + 3n (n packed rows), two bits each, plus one. The scale
lies beside them as `weight_scale`, which multiplies under `autobitlinear` and divides under
`bitlinear`. Checkpoints in `online` mode keep float weights, which become signs at load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from engine.errors import ConfigError

METHOD = "bitnet"
PER_BYTE = 4
SMALLEST_MEAN = 1e-5


@dataclass(frozen=True, eq=False)
class BitNetTensor:
    """A `TernaryTensor`: signs that are read when asked for, and their scale.

    `read` gives the signs of rows (first, behind the last), int8 `[rows, in]`; `rows` is which of
    them this is.
    """

    name: str
    columns: int
    scale: float
    rows: tuple[int, int]
    read: Callable[[int, int], torch.Tensor]

    format = "TERNARY"
    block = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows[1] - self.rows[0], self.columns)

    def narrow(self, dimension: int, start: int, length: int) -> BitNetTensor:
        assert dimension == 0, "a ternary matrix multiplies whole rows"
        first = self.rows[0] + start
        return replace(self, rows=(first, first + length))

    def signs(self) -> torch.Tensor:
        """int8 `[out, in]`."""
        return self.read(*self.rows)

    def dense(self) -> torch.Tensor:
        return self.signs().float() * self.scale

    def packed(self) -> torch.Tensor:
        raise ValueError(f"{self.name} is ternary, not in blocks")


@dataclass(frozen=True)
class BitNetLayout:
    """What a checkpoint's `quantization_config` says about its ternary weights."""

    divides: bool
    online: bool
    kept: tuple[str, ...]

    def converts(self, name: str) -> bool:
        """Whether tensor `name` is a linear of the ternary kind: all projections, unless kept."""
        module = name.removesuffix(".weight")
        return (
            name.endswith("_proj.weight")
            and ".layers." in name
            and not any(part == module or f"{part}." in module for part in self.kept)
        )

    def open(self, name: str, stored: Any, scale: torch.Tensor | None) -> BitNetTensor:
        """The ternary tensor of what the file stores (a slice of safetensors, not yet read).

        Raises ConfigError if it is none.
        """
        rows, columns = stored.get_shape()
        if scale is None:
            if not self.online:
                raise ConfigError(f"tensor {name!r} has no weight_scale beside it")
            mean = max(float(stored[:].float().abs().mean()), SMALLEST_MEAN)
            return BitNetTensor(name, columns, mean, (0, rows), partial(_nearest, stored, mean))
        value = float(scale.float().reshape(-1)[0])
        if scale.numel() != 1 or not value > 0:
            raise ConfigError(f"the weight_scale of {name!r} is not one positive number")
        factor = 1.0 / value if self.divides else value
        if stored.get_dtype() != "U8":
            return BitNetTensor(name, columns, factor, (0, rows), partial(_nearest, stored, 1.0))
        read = partial(unpack_rows, stored, name)
        return BitNetTensor(name, columns, factor, (0, rows * PER_BYTE), read)


def read_layout(config: dict[str, Any]) -> BitNetLayout:
    """Read BitNet's `quantization_config`. Raises ConfigError on what is unknown."""
    kind = config.get("linear_class", "bitlinear")
    mode = config.get("quantization_mode", "offline")
    if kind not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise ConfigError(f"BitNet linears of class {kind!r} in mode {mode!r} cannot be loaded")
    if config.get("use_rms_norm"):
        raise ConfigError("BitNet linears with a norm of their own (use_rms_norm) cannot be loaded")
    return BitNetLayout(
        divides=kind == "bitlinear",
        online=mode == "online",
        kept=tuple(config.get("modules_to_not_convert") or ()),
    )


def unpack_rows(stored: Any, name: str, first: int, last: int) -> torch.Tensor:
    """Signs of rows first .. last, reading only the packed rows that hold them."""
    packed_rows, columns = stored.get_shape()
    signs = torch.empty(last - first, columns, dtype=torch.int8)
    for field in range(PER_BYTE):
        start, end = max(first, field * packed_rows), min(last, (field + 1) * packed_rows)
        if start < end:
            bytes_ = stored[start - field * packed_rows : end - field * packed_rows]
            signs[start - first : end - first] = unpack(bytes_, field, name)
    return signs


def unpack(packed: torch.Tensor, field: int, name: str) -> torch.Tensor:
    """One of the four fields of packed rows, uint8 `[rows, in]`, as signs, int8."""
    codes = (packed >> (2 * field)) & 3
    if bool((codes == 3).any()):
        raise ConfigError(f"tensor {name!r} holds a code that is no ternary value; it is damaged")
    return codes.to(torch.int8) - 1


def _nearest(stored: Any, scale: float, first: int, last: int) -> torch.Tensor:
    weight: torch.Tensor = stored[first:last]
    return (weight.float() * (1.0 / scale)).round().clamp(-1, 1).to(torch.int8)
