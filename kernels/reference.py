"""Every op in plain torch, written to be read: the oracle for all other backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels.batch import Batch
from kernels.collectives import Collectives
from kernels.ops import (
    L2_EPSILON,
    SWIGLU_LIMIT,
    SWIGLU_SLOPE,
    Activation,
    DeltaHeads,
    Experts,
    GateActivation,
    HeadNorms,
    Heads,
    LatentHeads,
    Rope,
    Weight,
)
from kernels.routing import route


@dataclass(frozen=True, eq=False)
class TorchWeight(Weight):
    """A weight as a torch tensor `[out, in]` or `[n]`, with an optional bias `[out]`.

    A ternary one is its signs, int8, with a scale for each output: `scales` fp32 `[out]`.
    """

    tensor: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's keys and values, `[pages * page_size, kv heads, head_dim]`; a `windowed` one lies
    in window pages."""

    keys: torch.Tensor
    values: torch.Tensor
    windowed: bool = False


@dataclass(frozen=True, eq=False)
class LayerStates:
    """One layer's states: the last inputs of every channel, the oldest first, `[states, taps - 1,
    width]`, and each head's memory, `[states, value heads, key_dim, value_dim]`, fp32."""

    inputs: torch.Tensor
    memory: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is to be moved of them; short convolutions have no memory."""
        return [tensor for tensor in (self.inputs, self.memory) if tensor.numel()]


def tensor_of(weight: Weight) -> TorchWeight:
    """The torch form of a weight that a torch backend placed."""
    assert isinstance(weight, TorchWeight)
    return weight


class ReferenceOps:
    """An `Ops[torch.Tensor]`: activations in fp32, weights and cache as they are stored."""

    def __init__(
        self,
        caches: list[LayerCache],
        page_size: int,
        collectives: Collectives | None = None,
        states: list[LayerStates] | None = None,
    ) -> None:
        self.caches = caches
        self.states = states or []
        self.page_size = page_size
        self._collectives = collectives
        self.batch: Batch
        self._inverse_frequencies: dict[Rope, torch.Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """Take the step's inputs; everything that does not depend on the layer is done here."""
        self.batch = batch
        self.token_ids = torch.from_numpy(batch.token_ids)
        self.positions = torch.from_numpy(batch.positions)
        self.kv_slots = torch.from_numpy(batch.kv_slots)
        if batch.window_slots is not None:
            self.window_slots = torch.from_numpy(batch.window_slots)
        self.sample_rows = torch.from_numpy(batch.sample_rows)
        self._rotations: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}

    def embed(self, table: Weight, scale: float, first: int = 0) -> torch.Tensor:
        index = self.token_ids - first
        inside = (index >= 0) & (index < table.shape[0])
        rows = tensor_of(table).tensor[index.clamp(0, table.shape[0] - 1)].float()
        rows = torch.where(inside[:, None], rows, 0.0)
        return rows if scale == 1.0 else rows * scale

    def rms_norm(self, x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
        parts = x.view(*x.shape[:-1], x.shape[-1] // weight.shape[0], weight.shape[0])
        scaled = torch.nn.functional.rms_norm(parts, weight.shape, tensor_of(weight).tensor, eps)
        return scaled.view(x.shape)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: Weight,
        eps: float,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = (x + residual) * scale
        return self.rms_norm(total, weight, eps), total

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        placed = tensor_of(weight)
        if placed.scales is not None:
            # BitNet's own arithmetic (arXiv 2402.17764): each row of activations in int8.
            factor = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            y = torch.nn.functional.linear((x * factor).round(), placed.tensor.float())
            y = y * (placed.scales * (1.0 / factor))
            return y if placed.bias is None else y + placed.bias
        y = torch.nn.functional.linear(x.to(placed.tensor.dtype), placed.tensor, placed.bias)
        return y.float()

    def head_squares(self, qkv: torch.Tensor, heads: Heads, keys: bool) -> torch.Tensor:
        squares = qkv.float().square().view(len(qkv), -1, heads.dim).sum(-1)
        pairs = squares.new_zeros(len(qkv), heads.query, 2)
        pairs[..., 0] = squares[:, : heads.query]
        if keys:
            share = heads.query // heads.kv
            pairs[:, ::share, 1] = squares[:, heads.query : heads.query + heads.kv]
        return pairs.flatten(1)

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        layer: int,
        heads: Heads,
        rope: Rope,
        norms: HeadNorms | None,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = qkv.shape[0]
        split = [heads.query * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim]
        q, k, v = torch.split(qkv, split, dim=-1)
        q = q.view(rows, heads.query, heads.dim)
        k = k.view(rows, heads.kv, heads.dim)
        v = v.view(rows, heads.kv, heads.dim)
        if norms is not None and norms.whole is not None:
            assert squares is not None
            counts = (norms.whole.query, norms.whole.kv)
            means = squares.view(rows, -1, 2).sum(1) / (squares.new_tensor(counts) * heads.dim)
            factors = torch.rsqrt(means + norms.eps)[..., None, None]
            q = q * factors[:, 0] * tensor_of(norms.query).tensor.view(heads.query, heads.dim)
            k = k * factors[:, 1] * tensor_of(norms.key).tensor.view(heads.kv, heads.dim)
        elif norms is not None:
            q = self.rms_norm(q, norms.query, norms.eps)
            k = self.rms_norm(k, norms.key, norms.eps)
            if norms.value is not None:
                v = self.rms_norm(v, norms.value, norms.eps)
        cos, sin = self._rotation(rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if rope.growth:
            steps = (self.positions // rope.step).float()
            q = q * (1 + rope.growth * torch.log(1 + steps))[:, None, None]
        if heads.kv:
            cache = self.caches[layer]
            slots = self.window_slots if cache.windowed else self.kv_slots
            cache.keys.index_copy_(0, slots, k.to(cache.keys.dtype))
            cache.values.index_copy_(0, slots, v.to(cache.values.dtype))
        return q.reshape(rows, -1)

    def head_linear(self, x: torch.Tensor, weight: Weight, heads: int) -> torch.Tensor:
        placed = tensor_of(weight).tensor
        parts = x.view(len(x), heads, x.shape[1] // heads)[..., : weight.shape[1]].to(placed.dtype)
        own = placed.view(heads, -1, weight.shape[1])
        return torch.einsum("rhi,hoi->rho", parts, own).flatten(1).float()

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
        cos, sin = self._rotation(rope)
        latent = self.rms_norm(kv[:, : heads.rank].contiguous(), norm, eps)
        key = rotate(kv[:, None, heads.rank :], cos, sin)
        turned = rotate(
            q.view(len(q), heads.query, q.shape[1] // heads.query)[..., heads.plain :], cos, sin
        )
        cache, vector = self.caches[layer], torch.cat((latent[:, None], key), -1)
        for part in (cache.keys, cache.values):
            part.index_copy_(0, self.kv_slots, vector.to(part.dtype))
        return torch.cat((absorbed.view(-1, heads.query, heads.rank), turned), -1).flatten(1)

    def attention(
        self,
        q: torch.Tensor,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        sinks: Weight | None = None,
    ) -> torch.Tensor:
        q = q.view(-1, heads.query, heads.dim)
        out = torch.empty_like(q)
        cache = self.caches[layer]
        for chunk in range(len(self.batch.context_lengths)):
            first, last = (int(x) for x in self.batch.query_starts[chunk : chunk + 2])
            slots = self.context_slots(chunk, windowed=cache.windowed)
            group = heads.query // heads.kv
            keys = cache.keys[slots].float().repeat_interleave(group, dim=1)
            values = cache.values[slots].float().repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[first:last], keys) * scale
            visible = causal_mask(self.positions[first:last], len(slots), window)
            scores = scores.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                sink = tensor_of(sinks).tensor[:, None, None].expand(-1, last - first, 1)
                scores = torch.cat((scores, sink), -1)
            shares = scores.softmax(-1)[..., : len(slots)]
            out[first:last] = torch.einsum("hqk,khd->qhd", shares, values)
        return out.reshape(out.shape[0], -1)

    def gated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        if activation == "silu":
            return torch.nn.functional.silu(gate) * up
        if activation == "relu2":
            return torch.nn.functional.relu(gate).square() * up
        if activation == "swiglu_oai":
            gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
            return gate * torch.sigmoid(SWIGLU_SLOPE * gate) * (up + 1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

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
        liked, by = (None if v is None else tensor_of(v).tensor for v in (preference, factors))
        chosen, shares = route(scores, experts, liked, by)
        out = x.new_zeros(len(x), experts.places, x.shape[1])
        for number in range(experts.own):
            rows, places = (chosen == experts.first + number).nonzero(as_tuple=True)
            if len(rows):
                hidden = self.linear(x[rows], part_of(gate_up, number, experts.own))
                y = self.linear(self.gated(hidden, activation), part_of(down, number, experts.own))
                out[rows, places] = y * shares[rows, places, None]
        return out.flatten(1)

    def sum_parts(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        return x.view(len(x), parts, x.shape[1] // parts).sum(1)

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
        b, a = gates.float().chunk(2, dim=-1)
        grown = torch.nn.functional.softplus(a + tensor_of(offset).tensor)
        shares, decays = b.sigmoid(), torch.exp(-tensor_of(decay).tensor * grown)
        out = qkv.new_empty(len(qkv), heads.value, heads.value_dim)
        weights = tensor_of(taps).tensor.view(heads.taps, heads.width)
        states, batch = self.states[layer], self.batch
        for chunk, place in enumerate(batch.table_rows.tolist()):
            first, last = (int(x) for x in batch.query_starts[chunk : chunk + 2])
            inputs, memory = states.inputs[place], states.memory[place]
            if int(batch.positions[first]) == 0:
                inputs, memory = torch.zeros_like(inputs), torch.zeros_like(memory)
            kept = -1 if batch.kept_rows is None else int(batch.kept_rows[chunk])
            history = torch.cat((inputs, qkv[first:last].float()))
            windows = history.unfold(0, heads.taps, 1)  # [rows, width, taps]
            convolved = (windows * weights.t()).sum(-1)
            q, k, v = _delta_inputs(torch.nn.functional.silu(convolved), heads)
            for row in range(last - first + 1):
                if row == kept:
                    assert batch.kept_at is not None
                    target = int(batch.kept_at[chunk])
                    states.inputs[target] = history[row : row + heads.taps - 1]
                    states.memory[target] = memory
                if row < last - first:
                    memory = memory * decays[first + row, :, None, None]
                    found = (memory * k[row, :, :, None]).sum(-2)
                    change = (v[row] - found) * shares[first + row, :, None]
                    memory = memory + k[row, :, :, None] * change[:, None]
                    out[first + row] = (memory * q[row, :, :, None]).sum(-2)
            states.inputs[place] = history[last - first :]
            states.memory[place] = memory
        return out.flatten(1)

    def short_conv(
        self, x: torch.Tensor, layer: int, heads: DeltaHeads, taps: Weight
    ) -> torch.Tensor:
        b, c, values = x.float().chunk(3, dim=-1)
        fresh, out = b * values, torch.empty_like(c)
        weights = tensor_of(taps).tensor.view(heads.taps, heads.width)
        states, batch = self.states[layer], self.batch
        for chunk, place in enumerate(batch.table_rows.tolist()):
            first, last = (int(x) for x in batch.query_starts[chunk : chunk + 2])
            inputs = states.inputs[place]
            if int(batch.positions[first]) == 0:
                inputs = torch.zeros_like(inputs)
            history = torch.cat((inputs, fresh[first:last]))
            windows = history.unfold(0, heads.taps, 1)  # [rows, width, taps]
            out[first:last] = (windows * weights.t()).sum(-1) * c[first:last]
            kept = -1 if batch.kept_rows is None else int(batch.kept_rows[chunk])
            if kept >= 0:
                assert batch.kept_at is not None
                target = int(batch.kept_at[chunk])
                states.inputs[target] = history[kept : kept + heads.taps - 1]
            states.inputs[place] = history[last - first :]
        return out

    def gated_norm(
        self, x: torch.Tensor, gate: torch.Tensor, weight: Weight, eps: float
    ) -> torch.Tensor:
        return self.rms_norm(x, weight, eps) * torch.nn.functional.silu(gate)

    def gate(
        self, x: torch.Tensor, gate: torch.Tensor, activation: GateActivation, first: int = 0
    ) -> torch.Tensor:
        if activation == "sigmoid":
            factor = gate.sigmoid()
        else:
            factor = torch.nn.functional.gelu(gate, approximate="tanh")
        return x[:, first : first + gate.shape[1]] * factor

    def softcap(self, logits: torch.Tensor, cap: float) -> torch.Tensor:
        return cap * torch.tanh(logits / cap)

    def select_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.sample_rows]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert self._collectives is not None, "one rank has nobody to meet"
        return self._collectives.all_reduce(x)

    def all_gather(self, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        assert self._collectives is not None, "one rank has nobody to meet"
        return self._collectives.all_gather(x, widths)

    def context_slots(self, chunk: int, *, windowed: bool = False) -> torch.Tensor:
        """Flat cache slots of a chunk's whole context, int64 `[context]`, in position order; those
        of window pages mean something within the window."""
        table = self.batch.window_table if windowed else self.batch.page_table
        assert table is not None
        length = int(self.batch.context_lengths[chunk])
        pages = -(-length // self.page_size)
        row = table[self.batch.table_rows[chunk], :pages]
        base = torch.from_numpy(row).long() * self.page_size
        return (base[:, None] + torch.arange(self.page_size)).flatten()[:length]

    def _rotation(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of this step's positions, fp32 `[tokens, 1, head_dim / 2]`."""
        if rope not in self._rotations:
            if rope not in self._inverse_frequencies:
                frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
                self._inverse_frequencies[rope] = frequencies
            frequencies = self._inverse_frequencies[rope]
            angles = self.positions.float()[:, None] * frequencies
            size = torch.where(frequencies == 0, 1.0, rope.magnitude)
            self._rotations[rope] = ((angles.cos() * size)[:, None], (angles.sin() * size)[:, None])
        return self._rotations[rope]


def _delta_inputs(
    x: torch.Tensor, heads: DeltaHeads
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of every value head, `[rows, value, dim]`."""
    wide = heads.key * heads.key_dim
    q, k, v = torch.split(x, [wide, wide, heads.value * heads.value_dim], dim=-1)
    q, k = (part.view(len(x), heads.key, heads.key_dim) for part in (q, k))
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + L2_EPSILON) for part in (q, k))
    share = heads.value // heads.key
    order = torch.arange(heads.value)
    order = order % heads.key if heads.tiled else order // share
    q, k = (q * heads.key_dim**-0.5)[:, order], k[:, order]
    return q, k, v.view(len(x), heads.value, heads.value_dim)


def part_of(weight: Weight, number: int, parts: int) -> TorchWeight:
    """One of the equal parts that are stacked in a weight."""
    whole, rows = tensor_of(weight), weight.shape[0] // parts
    place = slice(number * rows, (number + 1) * rows)
    scales = whole.scales[place] if whole.scales is not None else None
    bias = whole.bias[place] if whole.bias is not None else None
    return replace(whole, tensor=whole.tensor[place], scales=scales, bias=bias)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head: `x` `[rows, heads, dim]`, cos and sin `[rows, 1, dim/2]`."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def causal_mask(positions: torch.Tensor, context: int, window: int) -> torch.Tensor:
    """Which of `context` keys each query sees: bool `[queries, context]`."""
    keys = torch.arange(context)
    visible = keys[None, :] <= positions[:, None]
    if window > 0:
        visible &= keys[None, :] > positions[:, None] - window
    return visible
