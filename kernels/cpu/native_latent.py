"""Multi-head latent attention as native instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernels.ops import LatentHeads, Rope
from kernels.rotation import Rotations

if TYPE_CHECKING:
    from kernels.cpu.native_weights import NativeWeight


class LatentInstructions:
    """What a program emits for it, but for attention."""

    _program: Any
    _rotations: Rotations
    _positions: int

    def _emit_head_linear(self, x: int, weight: NativeWeight, heads: int, out: int) -> None:
        self._program.add_head_linear(in_=x, out=out, weight=weight.packed, heads=heads)

    def _emit_write_latent(
        self,
        absorbed: int,
        q: int,
        kv: int,
        layer: int,
        heads: LatentHeads,
        rope: Rope,
        norm: NativeWeight,
        eps: float,
        out: int,
    ) -> None:
        cosine, sine, _ = self._rotations.of(rope, self._positions)
        self._program.add(
            "write_latent",
            in_=absorbed,
            in2=q,
            in3=kv,
            out=out,
            layer=layer,
            heads=heads.query,
            vector=norm.address,
            scalar=eps,
            window=heads.rank,
            first=heads.plain,
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
        )
