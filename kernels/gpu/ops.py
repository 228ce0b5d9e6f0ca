"""The op protocol on Triton kernels: shapes are those of the largest batch that a launch serves."""

from __future__ import annotations

import torch

from kernels.collectives import Collectives
from kernels.gpu.attention import AttentionShape
from kernels.gpu.configs import (
    embed_config,
    gated_config,
    gather_config,
    quantize_config,
    rope_config,
    scatter_config,
    select_config,
    sum_parts_config,
    values_config,
)
from kernels.gpu.experts import Layout, sort_rows
from kernels.gpu.latent import LatentOps
from kernels.gpu.matmul import MAX_FEW, MatmulShape, dense_linear
from kernels.gpu.norm_ops import NormOps
from kernels.gpu.pointwise import PointwiseOps
from kernels.gpu.row_ops import RowOps
from kernels.gpu.staging import Staging
from kernels.gpu.state_ops import StateOps
from kernels.gpu.weights import GpuWeight, gpu
from kernels.gpu.workspace import Bucket, GpuCache, Workspace
from kernels.ops import Activation, Experts, HeadNorms, Heads, Rope, Weight
from kernels.reference import LayerStates

# Above so many rows, weights in groups are made floats for cuBLAS, so many elements at a time.
OWN_ROWS = {"group8": 95, "group4": 128}
SCRATCH_ELEMENTS = 16 << 20
LOG2_E = 1.4426950408889634


class GpuOps(RowOps, LatentOps, StateOps, PointwiseOps, NormOps):
    """An `Ops[torch.Tensor]`: activations in `dtype`, logits in fp32."""

    def __init__(
        self,
        caches: list[GpuCache],
        page_size: int,
        staging: Staging,
        workspace: Workspace,
        dtype: torch.dtype,
        context: int,
        invariant: bool,
        collectives: Collectives | None = None,
        states: list[LayerStates] | None = None,
    ) -> None:
        self._caches = caches
        self._states = states or []
        self._page = page_size
        self._staging = staging
        self._workspace = workspace
        self._dtype = dtype
        self._context = context
        self._invariant = invariant
        self._collectives = collectives
        # Machine instructions are written out where there is a machine, and for bf16.
        self._inline = workspace.device.type == "cuda" and dtype == torch.bfloat16
        self.bucket = Bucket(1, 1, 1, True)
        self.target: torch.Tensor | None = None
        """Where the next op writes, if it makes logits or selects rows."""

    def embed(self, table: Weight, scale: float, first: int = 0) -> torch.Tensor:
        weight, s = gpu(table), self._staging
        out = self._rows(self.bucket.rows, table.shape[1])
        config, blocks = embed_config(table.shape[1], weight.form)
        inputs = (s.token_ids, s.last_ids, s.slots, s.fed, scale, table.shape[0], first)
        grid = (self.bucket.rows, blocks)
        if weight.format == "float":
            config.launch(grid, out, weight.tensor, *inputs)
        else:
            lows = weight.lows if weight.lows is not None else weight.tensor
            tables = (weight.tensor, weight.scales, lows)
            config.launch(grid, out, *tables, *inputs)
        return out

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        placed = gpu(weight)
        out = self._result(len(x), weight.shape[0], wide=placed.wide)
        if not self._invariant and self._dense(out, x, placed):
            return out
        self._multiply(
            out, x, placed, self._matmul_shape(len(x), weight.shape[0], weight.shape[1], placed)
        )
        return out

    def experts(
        self,
        x: torch.Tensor,
        scores: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        experts: Experts,
        activation: Activation,
        preference: Weight | None = None,
        factors: Weight | None = None,
    ) -> torch.Tensor:
        layout = Layout(experts, len(x), self._invariant)
        # The last start is the number of rows that are none of the padding.
        liked, by = (None if v is None else gpu(v).tensor for v in (preference, factors))
        order = sort_rows(scores, layout, self._staging.query_starts[-1:], liked, by)
        places, hidden = len(order.sources), x.shape[1]
        config, blocks = gather_config(hidden)
        rows = self._rows(places, hidden)
        config.launch((places, blocks), rows, x, order.sources)
        for stacked in (gate_up, down):
            weight = gpu(stacked)
            outputs, inputs = weight.shape[0] // experts.own, weight.shape[1]
            shape = self._matmul_shape(places, outputs, inputs, weight, layout.block_rows)
            y = self._rows(places, outputs)
            self._multiply(y, rows, weight, shape, order.experts)
            rows = self.gated(y, activation) if stacked is gate_up else y
        out = self._rows(len(x), experts.places * hidden)
        config, blocks = scatter_config(hidden)
        config.launch((layout.choices, blocks), out, rows, order.places, order.shares)
        return out

    def sum_parts(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        out = self._rows(len(x), x.shape[1] // parts)
        config, blocks = sum_parts_config(x.shape[1] // parts, parts)
        config.launch((len(x), blocks), out, x)
        return out

    def _multiply(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        placed: GpuWeight,
        shape: MatmulShape,
        experts: torch.Tensor | None = None,
    ) -> None:
        """A matmul by our own kernel; `experts` are those of blocks of rows."""
        scales = x
        if placed.format == "int8":
            numbers = torch.empty_like(x, dtype=torch.int8)
            scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
            quantize_config(x.shape[1]).launch((len(x),), numbers, scales, x)
            x = numbers
        parts = len(x) * shape.outputs * shape.splits if shape.splits > 1 else 1
        partial = torch.empty(parts, dtype=torch.float32, device=x.device)
        tiles = shape.grid[0] * shape.grid[1] if shape.splits > 1 else 1
        arrived = self._workspace.arrived(tiles)
        shape.config().launch(
            shape.grid,
            out,
            x,
            scales,
            placed.cells,
            placed.scales if placed.scales is not None else placed.tensor,
            placed.lows if placed.lows is not None else placed.tensor,
            placed.bias if placed.bias is not None else placed.tensor,
            partial,
            arrived,
            experts if experts is not None else arrived,
            len(x),
            shape.outputs,
            shape.inputs,
            placed.cells.shape[1],
            placed.groups,
        )

    def _dense(self, out: torch.Tensor, x: torch.Tensor, weight: GpuWeight) -> bool:
        """What is fastest through cuBLAS, in floats; whether it is."""
        few = len(x) <= MAX_FEW and self._dtype != torch.float32
        if weight.format == "float" and not few:
            dense_linear(out, x, weight.tensor, weight.bias)
            return True
        if weight.format not in OWN_ROWS or len(x) <= OWN_ROWS[weight.format]:
            return False
        # Some outputs at a time, so that what is written is read from the cache.
        outputs, inputs = weight.shape
        # Each time an even number of tiles, whose results begin at 16 bytes.
        rows = min(outputs, max(1, SCRATCH_ELEMENTS // inputs // 128) * 128)
        scratch = self._rows(rows, inputs)
        config, blocks = values_config(inputs, weight.form)
        for first in range(0, outputs, rows):
            count = min(rows, outputs - first)
            config.launch(
                (count, blocks), scratch, weight.cells, weight.scales, weight.lows, first,
            )  # fmt: skip
            bias = None if weight.bias is None else weight.bias[first : first + count]
            dense_linear(out[:, first : first + count], x, scratch[:count], bias)
        return True

    @property
    def ranks(self) -> int:
        """Ranks that share the model."""
        return self._collectives.ranks if self._collectives is not None else 1

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        layer: int,
        heads: Heads,
        rope: Rope,
        norms: HeadNorms | None,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cache, s = self._caches[layer], self._staging
        out = self._rows(len(qkv), heads.query * heads.dim)
        cosine, sine, growth = self._workspace.rotations.of(rope, self._context)
        quantized = cache.key_scales is not None
        grows = growth is not None
        of_values = norms.value if norms is not None else None
        config, blocks = rope_config(
            heads,
            norms=norms is not None,
            value_norm=of_values is not None,
            quantized=quantized,
            grows=grows,
            whole=norms.whole if norms is not None else None,
        )
        config.launch(
            (len(qkv), blocks),
            out,
            cache.keys,
            cache.values,
            cache.key_scales if quantized else cache.keys,
            cache.value_scales if quantized else cache.values,
            qkv,
            s.positions,
            s.window_slots if cache.windowed else s.kv_slots,
            cosine,
            sine,
            gpu(norms.query).tensor if norms else cosine,
            gpu(norms.key).tensor if norms else cosine,
            gpu(of_values).tensor if of_values is not None else cosine,
            growth if growth is not None else cosine,
            squares if squares is not None else cosine,
            norms.eps if norms else 0.0,
        )
        return out

    def attention(
        self,
        q: torch.Tensor,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        sinks: Weight | None = None,
    ) -> torch.Tensor:
        cache, s, bucket = self._caches[layer], self._staging, self.bucket
        shape = AttentionShape(
            heads,
            self._page,
            self._dtype,
            cache.key_scales is not None,
            window > 0,
            bucket.rows,
            bucket.sequences,
            bucket.decode and not self._invariant,
            self._invariant,
            self._workspace.hopper,
            sinks is not None,
        )
        scores = gpu(sinks).tensor if sinks is not None else q
        out = torch.empty_like(q)
        partial, sums = shape.workspace(q.device)
        main, merge = shape.configs()
        main.launch(
            (shape.blocks, shape.groups, shape.splits),
            out,
            partial,
            sums,
            q,
            cache.keys,
            cache.values,
            cache.key_scales if shape.quantized else cache.keys,
            cache.value_scales if shape.quantized else cache.values,
            s.query_starts,
            s.context_lengths,
            s.window_table if cache.windowed else s.page_table,
            scores,
            scale * LOG2_E,
            window,
            bucket.sequences,
            s.table_stride,
        )
        if merge is not None:
            grid = (bucket.rows, heads.query)
            merge.launch(grid, out, partial, sums, s.query_starts, scores, bucket.sequences)
        return out

    def gated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        width = x.shape[1] // 2
        out = self._rows(len(x), width)
        config, blocks = gated_config(width, activation)
        config.launch((len(x), blocks), out, x)
        return out

    def select_rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.bucket.samples
        out = self._result(rows, x.shape[1])
        config, blocks = select_config(x.shape[1])
        config.launch((self.bucket.samples, blocks), out, x, self._staging.sample_rows)
        return out

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert self._collectives is not None, "one rank has nobody to meet"
        return self._collectives.all_reduce(x)

    def all_gather(self, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        assert self._collectives is not None, "one rank has nobody to meet"
        gathered = self._collectives.all_gather(x, widths)
        if self.target is None:
            return gathered
        return self.target[: len(x)].copy_(gathered)

    def _matmul_shape(
        self, rows: int, outputs: int, inputs: int, weight: GpuWeight, expert_rows: int = 0
    ) -> MatmulShape:
        return MatmulShape(
            rows,
            outputs,
            inputs,
            weight.format,
            weight.group or 1,
            self._dtype,
            weight.bias is not None,
            self._invariant,
            self._workspace.hopper,
            weight.zeros,
            self._inline,
            expert_rows,
        )

    def _result(self, rows: int, width: int, *, wide: bool = False) -> torch.Tensor:
        return self._rows(rows, width, wide=wide) if self.target is None else self.target[:rows]

    def _rows(self, rows: int, width: int, *, wide: bool = False) -> torch.Tensor:
        dtype = torch.float32 if wide else self._dtype
        return torch.empty(rows, width, dtype=dtype, device=self._workspace.device)
