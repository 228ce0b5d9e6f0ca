"""Rotary embedding's tables."""

from __future__ import annotations

import torch

from kernels.ops import Rope

# cos, sin and the growth of queries: see `rotation_tables`.
Rotation = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def rotation_tables(rope: Rope, positions: int) -> Rotation:
    """cos and sin of every position, fp32 `[positions, head_dim / 2]`, and what queries there are
    multiplied by, fp32 `[positions]`, or None."""
    frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    magnitudes = torch.where(frequencies == 0, 1.0, rope.magnitude)
    growth = None
    if rope.growth:
        growth = 1 + rope.growth * torch.log1p((torch.arange(positions) // rope.step).float())
    return (
        (angles.cos() * magnitudes).contiguous(),
        (angles.sin() * magnitudes).contiguous(),
        growth,
    )


class Rotations:
    """The tables of every rotation that was asked for, on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[Rope, Rotation] = {}

    def of(self, rope: Rope, positions: int) -> Rotation:
        """As `rotation_tables`, of so many positions the first time."""
        if rope not in self._made:
            cosine, sine, growth = rotation_tables(rope, positions)
            placed = growth.to(self._device) if growth is not None else None
            self._made[rope] = (cosine.to(self._device), sine.to(self._device), placed)
        return self._made[rope]
