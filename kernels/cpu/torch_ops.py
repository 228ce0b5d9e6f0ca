"""The torch CPU path: the reference ops, with attention through torch's fused CPU kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.batch import Batch
from kernels.ops import Heads, Weight
from kernels.reference import ReferenceOps, causal_mask, tensor_of


@dataclass(frozen=True, eq=False)
class Group:
    """Chunks that attend in one kernel call: all decodes together, every prefill chunk alone.

    `rows` int64 `[sequences * queries]` of the token matrix, `slots` int64 `[sequences, context]`
    padded with slot 0, those of layers with window pages last, `positions` int64 `[sequences,
    queries]`.
    """

    rows: torch.Tensor
    slots: tuple[torch.Tensor, ...]
    positions: torch.Tensor


class TorchCpuOps(ReferenceOps):
    """Plans the step's attention once, then calls the fused kernel once per group and layer.

    Query heads that share a key/value head become query rows, so keys are never repeated.
    """

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._masks: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}
        counts = np.diff(batch.query_starts)
        decodes = np.flatnonzero(counts == 1)
        self._groups = [self._prefill_group(int(c)) for c in np.flatnonzero(counts > 1)]
        if len(decodes):
            self._groups.append(self._decode_group(decodes))

    def attention(
        self,
        q: torch.Tensor,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        sinks: Weight | None = None,
    ) -> torch.Tensor:
        cache = self.caches[layer]
        grouped = q.view(-1, heads.kv, heads.query // heads.kv, heads.dim).to(cache.keys.dtype)
        out = torch.empty_like(grouped)
        for number, group in enumerate(self._groups):
            slots = group.slots[-1 if cache.windowed else 0]
            sequences, context = slots.shape
            queries = group.positions.shape[1]
            share = heads.query // heads.kv
            # [sequences * queries, kv, share, dim] -> [sequences, kv, queries * share, dim]
            x = grouped[group.rows].view(sequences, queries, heads.kv, share, heads.dim)
            x = x.transpose(1, 2).reshape(sequences, heads.kv, queries * share, heads.dim)
            flat = slots.flatten()
            shape = (sequences, context, heads.kv, heads.dim)
            keys = cache.keys.index_select(0, flat).view(shape).transpose(1, 2)
            values = cache.values.index_select(0, flat).view(shape).transpose(1, 2)
            mask = self._mask(number, window, share, x.dtype)
            if sinks is not None:
                keys, values, mask = _with_sinks(keys, values, mask, tensor_of(sinks).tensor)
            y = torch.nn.functional.scaled_dot_product_attention(
                x, keys, values, attn_mask=mask, scale=scale
            )
            y = y.view(sequences, heads.kv, queries, share, heads.dim).transpose(1, 2)
            out[group.rows] = y.reshape(-1, heads.kv, share, heads.dim)
        return out.view(out.shape[0], -1).float()

    def _prefill_group(self, chunk: int) -> Group:
        first, last = (int(x) for x in self.batch.query_starts[chunk : chunk + 2])
        kinds = (False,) if self.batch.window_table is None else (False, True)
        slots = tuple(self.context_slots(chunk, windowed=kind)[None] for kind in kinds)
        return Group(torch.arange(first, last), slots, self.positions[None, first:last])

    def _decode_group(self, chunks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Group:
        lengths = self.batch.context_lengths[chunks]
        longest = int(lengths.max())
        rows = torch.from_numpy(self.batch.query_starts[chunks].astype(np.int64))
        found = []
        for table in (self.batch.page_table, self.batch.window_table):
            if table is None:
                continue
            pages = table[self.batch.table_rows[chunks], : -(-longest // self.page_size)]
            slots = pages[:, :, None].astype(np.int64) * self.page_size + np.arange(self.page_size)
            slots = slots.reshape(len(chunks), -1)[:, :longest]
            slots[np.arange(longest) >= lengths[:, None]] = 0
            found.append(torch.from_numpy(slots))
        return Group(rows, tuple(found), self.positions[rows][:, None])

    def _mask(self, number: int, window: int, share: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[sequences, 1, queries * share, context]`, made once per kind of layer."""
        key = (number, window, share, dtype)
        if key not in self._masks:
            group = self._groups[number]
            sequences, context = group.slots[0].shape
            visible = causal_mask(group.positions.flatten(), context, window)
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
            mask = mask.view(sequences, 1, -1, 1, context).expand(-1, -1, -1, share, -1)
            self._masks[key] = mask.reshape(sequences, 1, -1, context)
        return self._masks[key]


def _with_sinks(
    keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more key and value of zeros, `[sequences, kv, context + 1, dim]`, and the sinks, fp32
    `[query heads]`, as what the mask adds to its score: `[sequences, kv, rows, context + 1]`."""
    kv, (sequences, _, rows, context) = keys.shape[1], mask.shape
    share = len(sinks) // kv
    column = sinks.to(mask.dtype).view(1, kv, 1, share).expand(sequences, -1, rows // share, -1)
    mask = mask.expand(-1, kv, -1, context)
    mask = torch.cat((mask, column.reshape(sequences, kv, rows, 1)), -1)
    pad = torch.nn.functional.pad
    return pad(keys, (0, 0, 0, 1)), pad(values, (0, 0, 0, 1)), mask
