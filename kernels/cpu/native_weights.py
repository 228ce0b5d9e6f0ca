"""Weights as the native kernels read them: packed into tiles, in one format or in their own bits.

Quantized weights are served in their own bits: Q4_0, Q4_1, Q4_K, MXFP4 and Q8_0 blocks are repacked
without rounding, other quantized types become int8 in groups of 32. Float checkpoints are stored in
bfloat16, or as asked for; with `int4`, tables and heads are int8.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch

from kernels.backend import HostTensor, TernaryTensor, WeightFormat, stacked_name
from kernels.cpu.packed_file import PackedFile
from kernels.ops import Weight

# Numbers of the packed formats, as in native/weight.h.
F32, BF16, Q8, Q4, Q4_SUPER, TERNARY, FLOAT4, Q4_EVEN = range(8)
GROUP = 32
# ggml's type -> packed formats that hold it, the best first, and what repacks its blocks.
BLOCKS = {
    "Q4_0": ((Q4_EVEN, Q4), "pack_q4_0"),
    "Q4_1": ((Q4,), "pack_q4_1"),
    "Q8_0": ((Q8,), "pack_q8_0"),
    "Q4_K": ((Q4_SUPER,), "pack_q4_k"),
    "MXFP4": ((FLOAT4,), "pack_mxfp4"),
}
FLOATS = ("F32", "F16", "BF16")
PACKERS = {F32: "pack_f32", BF16: "pack_bf16", Q8: "pack_int8", Q4: "pack_int4"}
# A weight that wants more bits is not rounded.
FOUR_BITS, MOST_BITS = 4, 8
# Values that are converted at a time.
PACKED_AT_ONCE = 1 << 20
# Weights that took longer to pack are kept for the next start.
WORTH_KEEPING_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class NativeWeight(Weight):
    """A packed matrix with its bias, or a vector; the tensors keep the memory alive. A matmul with
    it wants its activations in the form `reads`."""

    packed: Any = None
    reads: str = "floats"
    vector: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def address(self) -> int:
        """Of a vector's values."""
        assert self.vector is not None
        return self.vector.data_ptr()

    @property
    def bias_address(self) -> int:
        """Of the bias, or 0."""
        return self.bias.data_ptr() if self.bias is not None else 0


class NativeWeights:
    """Packs weights in one format; with `rounds_pairs` bfloat16 ones meet activations like them.
    What those `beside` it have packed just so is theirs and its own."""

    def __init__(
        self,
        native: ModuleType,
        weight_format: WeightFormat,
        *,
        rounds_pairs: bool,
        packed_file: PackedFile | None = None,
        beside: NativeWeights | None = None,
    ) -> None:
        self._native = native
        self._format = weight_format
        self._pairs = "bf16" if rounds_pairs else "floats"
        self._packed_file = packed_file
        self._packing_seconds = 0.0
        self._arena = native.Arena()
        self._placed: dict[tuple[str, tuple[int, ...], int | None], tuple[NativeWeight, int]] = {}
        self._others = beside._placed if beside is not None else {}
        self._bytes = self._shared_bytes = 0

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        vector = len(parts[0].shape) == 1
        columns = () if vector else (parts[0].shape[1],)
        shape = (sum(part.shape[0] for part in parts), *columns)
        target = None if vector else self._target(parts, bits)
        key = (stacked_name(parts), shape, target)
        if key in self._others:
            weight, size = self._others[key]
            self._shared_bytes += size
            return weight
        weight = self._vector(parts) if target is None else self._matrix(parts, bias, target)
        size = sum(t.nbytes for t in (weight.vector, weight.bias) if t is not None)
        size += weight.packed.bytes if weight.packed is not None else 0
        self._bytes += size
        self._placed[key] = weight, size
        return weight

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        target = self._target(parts)
        unit = {F32: 1, BF16: 2, TERNARY: 0}.get(target, GROUP)
        return math.lcm(unit, *(part.block for part in parts)) or None

    def loaded_bytes(self, *, shared: bool = False) -> int:
        return self._bytes + (self._shared_bytes if shared else 0)

    def keep(self) -> None:
        """Write what took long to pack to its file, for the next start."""
        if self._packed_file is not None and self._packing_seconds > WORTH_KEEPING_SECONDS:
            self._packed_file.save()
            self._packing_seconds = 0.0

    def _vector(self, parts: Sequence[HostTensor]) -> NativeWeight:
        vector = torch.cat([part.dense().float() for part in parts])
        return NativeWeight(stacked_name(parts), tuple(vector.shape), vector=vector)

    def _matrix(
        self, parts: Sequence[HostTensor], bias: Sequence[HostTensor], target: int
    ) -> NativeWeight:
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        # Several weights may be made of rows of one tensor.
        name = f"{stacked_name(parts)}:{shape[0]}"
        packed = self._find_or_pack(name, parts, shape, target)
        added = torch.cat([b.dense().float() for b in bias]) if bias else None
        reads = {F32: "floats", BF16: self._pairs, TERNARY: "whole"}.get(target, "groups")
        return NativeWeight(stacked_name(parts), shape, packed=packed, reads=reads, bias=added)

    def _find_or_pack(
        self, name: str, parts: Sequence[HostTensor], shape: tuple[int, int], target: int
    ) -> Any:
        """The packed weight, from the file of an earlier start if it is there."""
        packed = self._native.make_weight(self._arena, target, *shape)
        file = self._packed_file
        if file is not None and file.copy(name, packed, *shape):
            return packed
        start, first = time.perf_counter(), 0
        for part in parts:
            self._pack(packed, first, part)
            first += part.shape[0]
        self._packing_seconds += time.perf_counter() - start
        if file is not None:
            file.collect(name, packed, *shape)
        return packed

    def _target(self, parts: Sequence[HostTensor], bits: int = 4) -> int:
        """The packed format that these parts take together."""
        formats = {part.format for part in parts}
        columns = parts[0].shape[1]
        if formats == {"TERNARY"}:
            return TERNARY
        if self._format == "float32":
            return F32
        floats = BF16 if columns % 2 == 0 else F32
        if self._format == "bfloat16" or columns % GROUP or bits > MOST_BITS:
            return floats
        if self._format == "int8":
            return Q8
        target = _shared_target(formats)
        if self._format == "int4" and target in (None, Q8):
            return Q4 if bits <= FOUR_BITS else Q8
        if target is not None:
            return target
        return floats if formats & set(FLOATS) else Q8

    def _pack(self, packed: Any, first: int, part: HostTensor) -> None:
        """A few rows at a time, so that hardly more memory is taken than the packed weight's."""
        rows, columns = part.shape
        step = max(1, PACKED_AT_ONCE // columns)
        for start in range(0, rows, step):
            piece = part.narrow(0, start, min(step, rows - start))
            self._pack_rows(packed, first + start, piece)

    def _pack_rows(self, packed: Any, first: int, part: HostTensor) -> None:
        rows = part.shape[0]
        if packed.format == TERNARY:
            ternary = cast("TernaryTensor", part)
            signs = ternary.signs().contiguous()
            self._native.pack_ternary(packed, first, signs.data_ptr(), rows, ternary.scale)
            return
        kind = BLOCKS.get(part.format)
        if kind is not None and packed.format in kind[0]:
            blocks = part.packed().contiguous()
            getattr(self._native, kind[1])(packed, first, blocks.data_ptr(), rows)
            return
        values = part.dense().float().contiguous()
        pack = PACKERS[packed.format]
        getattr(self._native, pack)(packed, first, values.data_ptr(), rows)


def _shared_target(formats: set[str]) -> int | None:
    """The best packed format that holds blocks of all these types; None if none does."""
    choices = [BLOCKS[kind][0] if kind in BLOCKS else () for kind in formats]
    return next((t for t in choices[0] if all(t in others for others in choices)), None)
