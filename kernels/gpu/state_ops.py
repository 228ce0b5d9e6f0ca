"""Those ops of the protocol that layers with states have."""

from __future__ import annotations

import torch

from kernels.gpu.recurrence import DeltaShape, gated_norm_config
from kernels.gpu.staging import Staging
from kernels.gpu.weights import gpu
from kernels.ops import DeltaHeads, Weight
from kernels.reference import LayerStates


class StateOps:
    """`_states` are those of the delta layers, one after the other."""

    _states: list[LayerStates]
    _staging: Staging

    def delta(
        self,
        qkv: torch.Tensor,
        gates: torch.Tensor,
        layer: int,
        heads: DeltaHeads,
        taps: Weight,
        decay: Weight,
        offset: Weight,
    ) -> torch.Tensor:
        states, s, rows = self._states[layer], self._staging, len(qkv)
        # A step of few rows has no more chunks than rows.
        sequences = min(rows, len(s.context_lengths))
        shape = DeltaShape(heads, sequences)
        channels = torch.empty(qkv.shape, dtype=torch.float32, device=qkv.device)
        starts = (s.positions, s.query_starts, s.states)
        shape.channels_config().launch(
            (rows, shape.parts), channels, qkv, states.inputs, gpu(taps).tensor, *starts, sequences
        )
        out = torch.empty(rows, heads.value * heads.value_dim, dtype=qkv.dtype, device=qkv.device)
        kept = (s.kept_rows, s.kept_at)
        weights = (gpu(decay).tensor, gpu(offset).tensor)
        shape.delta_config().launch(
            (sequences, heads.value, shape.blocks),
            out, states.memory, channels, gates, *weights, *starts, *kept,
        )  # fmt: skip
        shape.inputs_config().launch(
            (sequences, shape.input_blocks), states.inputs, qkv, *starts, *kept
        )
        return out

    def short_conv(
        self, x: torch.Tensor, layer: int, heads: DeltaHeads, taps: Weight
    ) -> torch.Tensor:
        states, s, rows = self._states[layer], self._staging, len(x)
        sequences = min(rows, len(s.context_lengths))
        shape = DeltaShape(heads, sequences)
        out = torch.empty(rows, heads.width, dtype=x.dtype, device=x.device)
        starts = (s.positions, s.query_starts, s.states)
        shape.short_conv_config().launch(
            (rows, shape.input_blocks),
            out, x, states.inputs, gpu(taps).tensor, *starts, sequences,
        )  # fmt: skip
        shape.inputs_config(gated=True).launch(
            (sequences, shape.input_blocks), states.inputs, x, *starts, s.kept_rows, s.kept_at
        )
        return out

    def gated_norm(
        self, x: torch.Tensor, gate: torch.Tensor, weight: Weight, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        width = weight.shape[0]
        parts = x.numel() // width
        gated_norm_config(width).launch((parts,), out, x, gate, gpu(weight).tensor, eps)
        return out
