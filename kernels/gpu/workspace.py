"""What the steps of a program share: the cache's memory, and what their launches work in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernels.gpu.launch import power_of_two
from kernels.rotation import Rotations


@dataclass(frozen=True)
class GpuCache:
    """One layer's keys and values `[pages * page_size, kv heads, head_dim]`, and their scales fp32
    `[pages * page_size, kv heads]` if they are int8; a `windowed` one lies in window pages."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    windowed: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Bucket:
    """Sizes that a launch is made for: token rows, chunks, logits rows; `decode` if every chunk is
    one token."""

    rows: int
    sequences: int
    samples: int
    decode: bool


@dataclass
class Workspace:
    """Memory that launches share because they run one after another."""

    device: torch.device
    hopper: bool = True
    counters: dict[int, torch.Tensor] = field(default_factory=dict)
    rotations: Rotations = field(init=False)

    def __post_init__(self) -> None:
        self.rotations = Rotations(self.device)

    def arrived(self, tiles: int) -> torch.Tensor:
        """Zeroed counters of a split matmul's tiles; each launch leaves them at zero."""
        size = power_of_two(tiles)
        if size not in self.counters:
            self.counters[size] = torch.zeros(size, dtype=torch.int32, device=self.device)
        return self.counters[size]
