"""One launch of a gated delta net over random states, and what it should give."""

from __future__ import annotations

import numpy as np
import torch

from kernels.batch import Batch
from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.weights import GpuWeight
from kernels.gpu.workspace import Bucket, Workspace
from kernels.ops import DeltaHeads
from kernels.reference import LayerStates, ReferenceOps, TorchWeight

PAGE = 16
BF16 = torch.bfloat16


class Delta:
    """Chunks of `counts` tokens that follow `before` others each; the first chunk's state is kept
    half way through it."""

    def __init__(
        self, device: torch.device, heads: DeltaHeads, counts: list[int], before: list[int]
    ) -> None:
        self._device, self._heads = device, heads
        spans = [np.arange(b, b + c) for c, b in zip(counts, before, strict=True)]
        chunks, rows = len(counts), sum(counts)
        kept = np.full(chunks, -1, np.int32)
        kept[0] = counts[0] // 2
        self._batch = Batch(
            token_ids=np.zeros(rows, np.int64),
            positions=np.concatenate(spans),
            kv_slots=np.zeros(rows, np.int64),
            query_starts=np.cumsum([0, *counts]).astype(np.int32),
            context_lengths=(np.array(counts) + before).astype(np.int32),
            table_rows=np.arange(chunks, dtype=np.int32)[::-1].copy(),
            page_table=np.zeros((chunks, 1), np.int32),
            sample_rows=np.zeros(0, np.int64),
            kept_rows=kept,
            kept_at=np.full(chunks, chunks, np.int32),
        )
        states = chunks + 1
        self._inputs = torch.randn(states, heads.taps - 1, heads.width, device=device)
        self._memory = torch.randn(
            states, heads.value, heads.key_dim, heads.value_dim, device=device
        )
        self._qkv = torch.randn(rows, heads.width, device=device).to(BF16)
        self._gates = torch.randn(rows, 2 * heads.value, device=device)
        self._weights = [
            torch.randn(heads.taps * heads.width, device=device),
            torch.rand(heads.value, device=device),
            torch.randn(heads.value, device=device),
        ]
        self._staging = Staging(rows, chunks, 1, PAGE - 1, device)
        self._staging.copy(self._batch)

    def run(self) -> torch.Tensor:
        """What the kernels give, and the states afterwards, as one vector."""
        states = LayerStates(self._inputs.clone(), self._memory.clone())
        workspace = Workspace(self._device)
        ops = GpuOps(
            [], PAGE, self._staging, workspace, BF16, PAGE, invariant=False, states=[states]
        )
        ops.bucket = Bucket(len(self._qkv), len(self._batch.table_rows), 1, decode=False)
        weights = [GpuWeight("w", tuple(w.shape), "float", w) for w in self._weights]
        out = ops.delta(self._qkv, self._gates, 0, self._heads, *weights)
        return torch.cat([t.flatten().float() for t in (out, states.inputs, states.memory)])

    def exact(self) -> torch.Tensor:
        """The same by the reference."""
        states = LayerStates(self._inputs.cpu().clone(), self._memory.cpu().clone())
        ops = ReferenceOps([], PAGE, states=[states])
        ops.begin(self._batch)
        weights = [TorchWeight("w", tuple(w.shape), w.cpu()) for w in self._weights]
        out = ops.delta(self._qkv.cpu().float(), self._gates.cpu(), 0, self._heads, *weights)
        found = torch.cat([t.flatten() for t in (out, states.inputs, states.memory)])
        return found.to(self._device).double()
