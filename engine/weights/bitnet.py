"""BitNet b1.58 weights (arXiv 2402.17764) in the layouts that Hugging Face checkpoints have.

A linear's values are signs times one scale. Published checkpoints pack the signs: a byte of row r
holds those of rows r, r + n, r + 2n and r + 3n (n packed rows), two bits each, plus one. The scale
lies beside them as `weight_scale`, which multiplies under `autobitlinear` and divides under
`bitlinear`. Checkpoints in `online` mode keep float weights, which become signs at load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ConfigError

METHOD = "bitnet"
PER_BYTE = 4
SMALLEST_MEAN = 1e-5


@dataclass(frozen=True, eq=False)
class BitNetTensor:
    """A `TernaryTensor`: signs that are read when asked for, and their scale."""

    name: str
    shape: tuple[int, ...]
    scale: float
    read_signs: Callable[[], torch.Tensor]

    format = "TERNARY"

    def signs(self) -> torch.Tensor:
        """int8 `[out, in]`."""
        return self.read_signs()

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

    def open(
        self, name: str, stored: Callable[[], torch.Tensor], scale: torch.Tensor | None
    ) -> BitNetTensor:
        """The ternary tensor of what the file stores. Raises ConfigError if it is none."""
        weight = stored()
        if scale is None:
            if not self.online:
                raise ConfigError(f"tensor {name!r} has no weight_scale beside it")
            mean = max(float(weight.float().abs().mean()), SMALLEST_MEAN)
            return BitNetTensor(name, tuple(weight.shape), mean, lambda: _nearest(stored(), mean))
        value = float(scale.float().reshape(-1)[0])
        if scale.numel() != 1 or not value > 0:
            raise ConfigError(f"the weight_scale of {name!r} is not one positive number")
        factor = 1.0 / value if self.divides else value
        if weight.dtype != torch.uint8:
            return BitNetTensor(name, tuple(weight.shape), factor, lambda: _nearest(stored(), 1.0))
        shape = (weight.shape[0] * PER_BYTE, weight.shape[1])
        return BitNetTensor(name, shape, factor, lambda: unpack(stored(), name))


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


def unpack(packed: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 `[out / 4, in]` to signs, int8 `[out, in]`."""
    fields = [(packed >> (2 * i)) & 3 for i in range(PER_BYTE)]
    codes = torch.cat(fields)
    if bool((codes == 3).any()):
        raise ConfigError(f"tensor {name!r} holds a code that is no ternary value; it is damaged")
    return codes.to(torch.int8) - 1


def _nearest(weight: torch.Tensor, scale: float) -> torch.Tensor:
    return (weight.float() * (1.0 / scale)).round().clamp(-1, 1).to(torch.int8)
