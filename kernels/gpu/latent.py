"""Those ops of the protocol that multi-head latent attention has beside attention itself."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu.fused import whole_steps
from kernels.gpu.launch import Config, announce, power_of_two, wait
from kernels.gpu.staging import Staging
from kernels.gpu.weights import gpu
from kernels.gpu.workspace import GpuCache, Workspace
from kernels.ops import LatentHeads, Rope, Weight

# Queries that one program makes.
HEADS = 4


@triton.jit(do_not_specialize=["rows"])
def head_linear_kernel(
    out,
    x,
    weight,
    rows,
    HEADS: tl.constexpr,
    GIVEN: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some outputs of one head for some rows: the first INPUTS of GIVEN values by its own weight
    `[OUTPUTS, INPUTS]`."""
    announce(EARLY)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    output = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    live, wanted = row < rows, output < OUTPUTS
    place = (row.to(tl.int64) * HEADS + head) * GIVEN
    own = weight + (head.to(tl.int64) * OUTPUTS + output) * INPUTS
    sums = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    wait(EARLY)
    for first in range(0, INPUTS, BLOCK_IN):
        at = first + column
        inside = at < INPUTS
        values = tl.load(
            x + place[:, None] + at[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        factors = tl.load(
            own[None, :] + at[:, None], mask=inside[:, None] & wanted[None, :], other=0.0
        )
        sums = tl.dot(values.to(factors.dtype), factors, sums, input_precision=PRECISION)
    place = (row.to(tl.int64) * HEADS + head) * OUTPUTS
    tl.store(
        out + place[:, None] + output[None, :],
        sums.to(out.dtype.element_ty),
        mask=live[:, None] & wanted[None, :],
    )


@triton.jit
def turn(places, inside, cos, sin, HALF: tl.constexpr):
    """Both halves of rotated values, of which the first lie at `places`."""
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def write_latent_kernel(
    out,
    cache,
    scales,
    absorbed,
    q,
    kv,
    positions,
    slots,
    cosine,
    sine,
    norm,
    eps,
    QUERY_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    PLAIN: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Of one token: by the first program its latent, normalized, and its rotated key, to the cache,
    by the others HEADS queries each."""
    announce(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = TURNED // 2
    DIM: tl.constexpr = RANK + TURNED
    dims, half = tl.arange(0, RANK_PADDED), tl.arange(0, HALF_PADDED)
    in_rank, in_half = dims < RANK, half < HALF
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cosine + position * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(sine + position * HALF + half, mask=in_half, other=0.0)
    if block == 0:
        slot = tl.load(slots + row).to(tl.int64)
        weight = tl.load(norm + dims, mask=in_rank, other=0.0)
        wait(EARLY)
        source = kv + row * DIM
        latent = tl.load(source + dims, mask=in_rank, other=0.0).to(tl.float32)
        latent *= tl.rsqrt(tl.sum(latent * latent, 0) / RANK + eps) * weight
        low, high = turn(source + RANK + half, in_half, cos, sin, HALF)
        if QUANTIZED:
            most = tl.maximum(tl.max(tl.abs(low), 0), tl.max(tl.abs(high), 0))
            most = tl.maximum(most, tl.max(tl.abs(latent), 0))
            tl.store(scales + slot, most / 127.0)
            latent = whole_steps(latent, most)
            low, high = whole_steps(low, most), whole_steps(high, most)
        place = cache + slot * DIM
        tl.store(place + dims, latent.to(cache.dtype.element_ty), mask=in_rank)
        tl.store(place + RANK + half, low.to(cache.dtype.element_ty), mask=in_half)
        tl.store(place + RANK + HALF + half, high.to(cache.dtype.element_ty), mask=in_half)
    else:
        head = (block - 1) * HEADS + tl.arange(0, HEADS)
        mine = (head < QUERY_HEADS)[:, None]
        number = (row * QUERY_HEADS + head)[:, None]
        wait(EARLY)
        plain = tl.load(
            absorbed + number * RANK + dims[None, :], mask=mine & in_rank[None, :], other=0.0
        )
        inside = mine & in_half[None, :]
        queries = q + number * (PLAIN + TURNED) + PLAIN + half[None, :]
        lows, highs = turn(queries, inside, cos[None, :], sin[None, :], HALF)
        places = out + number * DIM
        kind = out.dtype.element_ty
        tl.store(places + dims[None, :], plain.to(kind), mask=mine & in_rank[None, :])
        tl.store(places + RANK + half[None, :], lows.to(kind), mask=inside)
        tl.store(places + RANK + HALF + half[None, :], highs.to(kind), mask=inside)


def head_linear_config(
    rows: int,
    heads: int,
    given: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    *,
    invariant: bool = False,
) -> tuple[Config, tuple[int, int, int]]:
    """How heads' own matmul of so many rows is compiled, in one way only if `invariant`, and its
    programs."""
    few = rows <= 16 and not invariant
    block_m = 16 if few else 64
    block_out = min(32 if few else 64, max(16, power_of_two(outputs)))
    wide = dtype == torch.float32
    constants: dict[str, Any] = {
        "HEADS": heads,
        "GIVEN": given,
        "INPUTS": inputs,
        "OUTPUTS": outputs,
        "BLOCK_M": block_m,
        "BLOCK_OUT": block_out,
        "BLOCK_IN": min(64, max(16, power_of_two(inputs))),
        "PRECISION": "ieee" if wide else "tf32",
    }
    grid = (-(-rows // block_m), heads, -(-outputs // block_out))
    return Config(head_linear_kernel, constants, warps=4, stages=1 if wide else 3), grid


def write_latent_config(heads: LatentHeads, *, quantized: bool) -> tuple[Config, int]:
    """What a token leaves, and the blocks of its queries."""
    constants = {
        "QUERY_HEADS": heads.query,
        "RANK": heads.rank,
        "PLAIN": heads.plain,
        "TURNED": heads.turned,
        "HEADS": HEADS,
        "RANK_PADDED": power_of_two(heads.rank),
        "HALF_PADDED": power_of_two(heads.turned // 2),
        "QUANTIZED": quantized,
    }
    return Config(write_latent_kernel, constants, warps=4), 1 + -(-heads.query // HEADS)


class LatentOps:
    """Those ops; of a cache only the keys are written, which are also its values."""

    _caches: list[GpuCache]
    _staging: Staging
    _workspace: Workspace
    _dtype: torch.dtype
    _context: int
    _invariant: bool

    def head_linear(self, x: torch.Tensor, weight: Weight, heads: int) -> torch.Tensor:
        outputs, inputs = weight.shape[0] // heads, weight.shape[1]
        given, placed = x.shape[1] // heads, gpu(weight).tensor
        out = torch.empty(len(x), weight.shape[0], dtype=self._dtype, device=x.device)
        config, grid = head_linear_config(
            len(x), heads, given, outputs, inputs, placed.dtype, invariant=self._invariant
        )
        config.launch(grid, out, x, placed, len(x))
        return out

    def write_latent(
        self,
        absorbed: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: int,
        heads: LatentHeads,
        rope: Rope,
        norm: Weight,
        eps: float,
    ) -> torch.Tensor:
        cache, s = self._caches[layer], self._staging
        cosine, sine, _ = self._workspace.rotations.of(rope, self._context)
        width, scales = heads.query * heads.cached.dim, cache.key_scales
        out = torch.empty(len(q), width, dtype=self._dtype, device=q.device)
        config, blocks = write_latent_config(heads, quantized=scales is not None)
        config.launch(
            (len(q), blocks),
            out,
            cache.keys,
            scales if scales is not None else cache.keys,
            absorbed,
            q,
            kv,
            s.positions,
            s.kv_slots,
            cosine,
            sine,
            gpu(norm).tensor,
            eps,
        )
        return out
