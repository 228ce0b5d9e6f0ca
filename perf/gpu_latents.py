"""One launch of each kernel that latent attention has, and what they should give together."""

from __future__ import annotations

import torch

from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.weights import GpuWeight
from kernels.gpu.workspace import Bucket, GpuCache, Workspace
from kernels.ops import LatentHeads, Rope
from kernels.reference import LayerCache, ReferenceOps, TorchWeight
from perf.gpu_batches import PAGE, batch_over_pages

BF16 = torch.bfloat16
EPS, VALUE = 1e-6, 32


class Latents:
    """Chunks of `counts` tokens that follow `before` others each over a cache of random latents."""

    def __init__(
        self,
        device: torch.device,
        heads: LatentHeads,
        counts: list[int],
        before: list[int],
        workspace: Workspace,
    ) -> None:
        self._heads, self._device = heads, device
        self._batch = batch_over_pages(counts, before)
        chunks, width = self._batch.page_table.shape
        pages, rows = chunks * width, sum(counts)
        self._rope = Rope(tuple(1e4 ** (-2 * i / heads.turned) for i in range(heads.turned // 2)))

        def random(*shape: int, size: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device=device) * size).to(BF16)

        self._latents = random(pages * PAGE, 1, heads.cached.dim)
        self._q = random(rows, heads.query_width)
        self._kv = random(rows, heads.cached.dim)
        self._norm = torch.rand(heads.rank, device=device) + 0.5
        self._keys = random(heads.query * heads.rank, heads.plain, size=heads.plain**-0.5)
        self._values = random(heads.query * VALUE, heads.rank, size=heads.rank**-0.5)
        self._scale = (heads.rank + heads.turned) ** -0.5
        staging = Staging(rows, chunks, width, pages * PAGE - 1, device)
        staging.copy(self._batch)
        kept = self._latents.clone()
        cache = GpuCache(kept, kept)
        self._ops = GpuOps([cache], PAGE, staging, workspace, BF16, width * PAGE, invariant=False)
        decode = all(count == 1 for count in counts)
        self._ops.bucket = Bucket(rows, chunks, 1, decode)

    def run(self) -> torch.Tensor:
        """bf16 `[rows, query * VALUE]`."""
        heads = self._heads
        keys, values, norm = (
            GpuWeight("w", tuple(w.shape), "float", w)
            for w in (self._keys, self._values, self._norm)
        )
        absorbed = self._ops.head_linear(self._q, keys, heads.query)
        q = self._ops.write_latent(absorbed, self._q, self._kv, 0, heads, self._rope, norm, EPS)
        mixed = self._ops.attention(q, 0, heads.cached, self._scale, 0)
        return self._ops.head_linear(mixed, values, heads.query)

    def exact(self) -> torch.Tensor:
        """The same by the reference, in float32."""
        heads = self._heads
        latents = self._latents.cpu().float()
        ops = ReferenceOps([LayerCache(latents.clone(), latents.clone())], PAGE)
        ops.begin(self._batch)
        keys, values, norm = (
            TorchWeight("w", tuple(w.shape), w.cpu().float())
            for w in (self._keys, self._values, self._norm)
        )
        q, kv = self._q.cpu().float(), self._kv.cpu().float()
        absorbed = ops.head_linear(q, keys, heads.query)
        q = ops.write_latent(absorbed, q, kv, 0, heads, self._rope, norm, EPS)
        mixed = ops.attention(q, 0, heads.cached, self._scale, 0)
        return ops.head_linear(mixed, values, heads.query).to(self._device).double()
