"""One row's queries, keys and values, rotated and written to the cache: at once and one by one."""

from __future__ import annotations

import torch

from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.weights import GpuWeight
from kernels.gpu.workspace import GpuCache, Workspace
from kernels.ops import Heads, Rope
from perf.gpu_tensors import dense_of

BF16 = torch.bfloat16
PAGE, POSITION, SLOT, EPS = 16, 7, 3, 1e-5


class HeadsOfRow:
    """`weight` makes the heads of a normalized random row."""

    def __init__(
        self, device: torch.device, heads: Heads, weight: GpuWeight, workspace: Workspace
    ) -> None:
        self._heads, self._weight = heads, weight
        self._x = torch.randn(1, weight.shape[1], device=device).to(BF16)
        scale = torch.rand(weight.shape[1], device=device) + 0.5
        self._norm = GpuWeight("n", (len(scale),), "float", scale)
        self._rope = Rope(tuple(1e4 ** (-2 * i / heads.dim) for i in range(heads.dim // 2)))
        made = [torch.zeros(PAGE, heads.kv, heads.dim, device=device, dtype=BF16) for _ in "kv"]
        self._cache = GpuCache(*made)
        staging = Staging(1, 1, 1, PAGE - 1, device)
        staging.positions.fill_(POSITION)
        staging.kv_slots.fill_(SLOT)
        self._ops = GpuOps([self._cache], PAGE, staging, workspace, BF16, PAGE, False)

    def at_once(self) -> torch.Tensor:
        """Queries."""
        before = (self._x, self._weight, self._norm, EPS)
        return self._ops.row_heads(*before, 0, self._heads, self._rope)

    def one_by_one(self) -> torch.Tensor:
        """The same by two ops."""
        qkv = self._ops.row_linear(self._x, self._weight, self._norm, EPS, None, "")
        return self._ops.rope_write_kv(qkv, 0, self._heads, self._rope, None)

    def all_heads(self) -> torch.Tensor:
        """Queries, then the keys and values that lie in the cache afterwards, bf16."""
        queries, cache = self.at_once(), self._cache
        return torch.cat(
            [queries.flatten(), cache.keys[SLOT].flatten(), cache.values[SLOT].flatten()]
        )

    def exact(self) -> torch.Tensor:
        """What `all_heads` should be, in float64."""
        heads, x = self._heads, self._x.double()
        normed = x * torch.rsqrt(x.square().mean() + EPS) * self._norm.tensor
        made = (normed @ dense_of(self._weight).t()).view(-1, heads.dim)
        angles = POSITION * torch.tensor(self._rope.inverse_frequencies, device=x.device).double()
        first, second = made[: heads.query + heads.kv].chunk(2, 1)
        low = first * angles.cos() - second * angles.sin()
        high = second * angles.cos() + first * angles.sin()
        return torch.cat([torch.cat([low, high], 1), made[heads.query + heads.kv :]]).flatten()
