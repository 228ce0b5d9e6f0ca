"""Those ops of the protocol that are norms, or what norms over several heads need."""

from __future__ import annotations

import torch

from kernels.gpu.configs import head_squares_config, norm_config
from kernels.gpu.weights import gpu
from kernels.ops import Heads, Weight


class NormOps:
    """Results are stored as what is normalized is; sums of squares in fp32."""

    def rms_norm(self, x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
        out, width = torch.empty_like(x), weight.shape[0]
        norm_config(width, add=False).launch(
            (x.numel() // width,), out, out, x, x, gpu(weight).tensor, eps, 1.0
        )
        return out

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: Weight,
        eps: float,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = torch.empty_like(x), torch.empty_like(x)
        norm_config(x.shape[1], add=True).launch(
            (len(x),), out, total, x, residual, gpu(weight).tensor, eps, scale
        )
        return out, total

    def head_squares(self, qkv: torch.Tensor, heads: Heads, keys: bool) -> torch.Tensor:
        out = torch.empty(len(qkv), 2 * heads.query, dtype=torch.float32, device=qkv.device)
        head_squares_config(heads, keys=keys).launch((len(qkv), heads.query), out, qkv)
        return out
