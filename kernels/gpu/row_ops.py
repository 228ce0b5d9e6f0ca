"""Matmuls of one row with what stands around them, as ops that a tape for one row is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.gpu.digits import CHUNK, digits_heads_kernel, digits_kernel, digits_row_kernel
from kernels.gpu.launch import Config, power_of_two
from kernels.gpu.matmul import Form
from kernels.gpu.single import float_heads_kernel, float_row_kernel
from kernels.gpu.staging import Staging
from kernels.gpu.weights import GpuWeight, gpu
from kernels.gpu.workspace import GpuCache, Workspace
from kernels.ops import Heads, Rope, Weight


@dataclass(frozen=True)
class RowShape:
    """A matmul of one row: `outputs` after the gate, `inputs`; `inline` where machine instructions
    can be written out. With `heads` its outputs are rotated and written to the cache, and queries
    also grow if it `grows`."""

    outputs: int
    inputs: int
    form: Form
    bias: bool = False
    norm: bool = False
    add: bool = False
    activation: str = ""
    inline: bool = False
    hopper: bool = True
    heads: Heads | None = None
    grows: bool = False

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Outputs of a program, or pairs of them that are rotated, the columns or words that it
        reads at once, and its warps: what was fastest on an H200."""
        gated = self.activation != ""
        outputs = 4 if self.heads is None else 2
        if self.form.format == "group4":
            # A warp alone runs out of registers where rows are longer.
            alone = self.inputs <= 4096 if gated else 8192 <= self.inputs <= 14336 and self.hopper
            words = min(256, power_of_two(self.form.stride))
            return 2 if gated else outputs, words, 1 if alone else 2
        if gated and self.inputs <= 2048:
            return 1, power_of_two(self.inputs), 2
        return outputs, min(1024, power_of_two(self.inputs)), 4

    @property
    def grid(self) -> tuple[int]:
        """Programs."""
        parts = self.outputs if self.heads is None else self.outputs // 2
        return (-(-parts // self.blocks[0]),)

    def config(self) -> Config:
        """How the matmul is compiled."""
        four = self.form.format == "group4"
        block_out, block_in, warps = self.blocks
        columns = self.form.stride if four else self.inputs
        constants: dict[str, Any] = {
            "BLOCK_OUT": block_out,
            "BLOCK_IN": block_in,
            "WHOLE": columns % block_in == 0,
            "BIAS": self.bias,
        }
        if self.heads is None:
            constants |= {"ADD": self.add, "ACTIVATION": self.activation}
        else:
            heads = {"QUERY_HEADS": self.heads.query, "KV_HEADS": self.heads.kv}
            constants |= {**heads, "DIM": self.heads.dim, "GROWS": self.grows}
        if four:
            constants |= {"WORDS": self.form.stride, "GROUP": self.form.group}
            constants |= {"ZEROS": self.form.zeros, "INLINE": self.inline}
            kernel = digits_row_kernel if self.heads is None else digits_heads_kernel
        else:
            constants |= {"INPUTS": self.inputs, "NORM": self.norm}
            kernel = float_row_kernel if self.heads is None else float_heads_kernel
        return Config(kernel, constants, warps, stages=1)

    def digits_config(self) -> tuple[Config, int]:
        """How the row's digits are made, and by how many programs."""
        halves = self.form.stride * 4
        block = power_of_two(halves) if self.norm else min(512, power_of_two(halves))
        constants = {"INPUTS": self.inputs, "BLOCK": block, "NORM": self.norm}
        return Config(digits_kernel, constants, max(1, min(16, block // 128))), -(-halves // block)


def digits_of(
    x: torch.Tensor, shape: RowShape, norm: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row `[1, inputs]`, or its RMS norm, as whole numbers, steps and totals: see
    `digits_kernel`."""
    padded = shape.form.stride * 8
    digits = torch.empty(4, shape.form.stride, dtype=torch.int32, device=x.device)
    steps, totals = torch.empty(2, padded // CHUNK, dtype=torch.float32, device=x.device)
    config, programs = shape.digits_config()
    config.launch(
        (programs,), digits.view(torch.int8), steps, totals, x, norm if norm is not None else x,
        eps, padded,
    )  # fmt: skip
    return digits, steps, totals


class RowOps:
    """Those ops that only a tape for one row has, see `fuse`."""

    _caches: list[GpuCache]
    _staging: Staging
    _workspace: Workspace
    _dtype: torch.dtype
    _context: int
    _invariant: bool
    _inline: bool
    target: torch.Tensor | None

    def fits_row(self, weight: Weight) -> bool:
        """Whether `row_linear` takes this weight."""
        kind = gpu(weight).format
        # Digits hold no more than bf16 does.
        fits = kind == "float" or (kind == "group4" and self._dtype != torch.float32)
        return fits and not self._invariant

    def fits_heads(self, layer: int) -> bool:
        """Whether `row_heads` writes to this layer's cache: a scale for a head's vector takes all
        of it, which no program has."""
        return self._caches[layer].key_scales is None

    def row_linear(
        self,
        x: torch.Tensor,
        weight: Weight,
        norm: Weight | None,
        eps: float,
        residual: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        """`linear` of one row, `[1, out]`, or half as many with a gate: of its RMS norm if there is
        one, then gated, then added to the residual."""
        placed = gpu(weight)
        outputs = weight.shape[0] // (2 if activation else 1)
        added, scale = residual is not None, gpu(norm).tensor if norm is not None else None
        shape = self._row_shape(placed, outputs, norm=scale is not None, add=added)
        shape = replace(shape, activation=activation)
        out = self.target
        if out is None:
            kind = torch.float32 if placed.wide else self._dtype
            out = torch.empty(1, outputs, dtype=kind, device=x.device)
        out = out[:1]
        bias = placed.bias if placed.bias is not None else placed.tensor
        around = (bias, residual if residual is not None else x)
        if placed.format == "float":
            norms = (scale if scale is not None else x, eps)
            shape.config().launch(shape.grid, out, x, placed.tensor, *around, *norms, outputs)
            return out
        whole = digits_of(x, shape, scale, eps)
        tables = (placed.tensor, placed.scales, placed.lows)
        sizes = (outputs, placed.groups)
        shape.config().launch(shape.grid, out, *whole, *tables, *around, *sizes)
        return out

    def row_heads(
        self,
        x: torch.Tensor,
        weight: Weight,
        norm: Weight | None,
        eps: float,
        layer: int,
        heads: Heads,
        rope: Rope,
    ) -> torch.Tensor:
        """The queries `[1, query heads * dim]` that `rope_write_kv` makes of `row_linear`, whose
        keys and values it writes to the cache."""
        placed, cache, s = gpu(weight), self._caches[layer], self._staging
        cosine, sine, growth = self._workspace.rotations.of(rope, self._context)
        scale = gpu(norm).tensor if norm is not None else None
        shape = self._row_shape(placed, heads.qkv_width, norm=scale is not None)
        shape = replace(shape, heads=heads, grows=growth is not None)
        width = heads.query * heads.dim
        out = torch.empty(1, width, dtype=self._dtype, device=x.device)
        places = (out, cache.keys, cache.values)
        bias = placed.bias if placed.bias is not None else placed.tensor
        around = (
            s.positions,
            s.window_slots if cache.windowed else s.kv_slots,
            cosine,
            sine,
            growth if growth is not None else cosine,
            heads.dim // 2,
        )
        if placed.format == "float":
            norms = (scale if scale is not None else x, eps)
            shape.config().launch(shape.grid, *places, x, placed.tensor, bias, *norms, *around)
            return out
        whole = digits_of(x, shape, scale, eps)
        tables = (placed.tensor, placed.scales, placed.lows)
        shape.config().launch(shape.grid, *places, *whole, *tables, bias, *around, placed.groups)
        return out

    def _row_shape(
        self, placed: GpuWeight, outputs: int, *, norm: bool, add: bool = False
    ) -> RowShape:
        return RowShape(
            outputs,
            placed.shape[1],
            placed.form,
            placed.bias is not None,
            norm,
            add,
            inline=self._inline,
            hopper=self._workspace.hopper,
        )
