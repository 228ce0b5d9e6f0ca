"""Checkpoints that others have quantized: GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978), FP8 as
Qwen and DeepSeek store it, and compressed-tensors' forms of these.

Whole numbers in groups become ggml's blocks, whose bits every backend keeps: Q4_1, of which the
lowest value is rounded to fp16 (by at most a 250th of a step; not at all where 8 stands for zero),
or Q8_0. FP8 weights are floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from engine.errors import ConfigError
from engine.weights.blocks import Blocks
from kernels.backend import HostTensor

Span = tuple[int, int]
AnyTensor = TypeVar("AnyTensor", "GroupedTensor", "ScaledTensor")
Find = Callable[[str], Any]
"""A stored tensor's slice by its name, or None."""

METHODS = ("gptq", "awq", "fp8", "compressed-tensors")
BLOCK = 32
WORD_BITS = 32
# Values that are repacked together: more would not stay in a cache.
AT_ONCE = 1 << 20
# The order in which AWQ's words hold eight outputs.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
FP8, INT8 = "F8_E4M3", "I8"
AREA = (128, 128)
SCALES = ("weight_scale_inv", "weight_scale")
# What belongs to activations and the cache, or follows from others.
BESIDE = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "azp_adj",
    "activation_scale",
    "weight_shape",
)


@dataclass(frozen=True)
class Words:
    """Small numbers in int32 words, the lowest bits first: those of `order` if given. `stored` is
    `[out, in]`, or with `turned` `[in, out]`; words go along the outputs or along the inputs."""

    stored: Any
    bits: int
    turned: bool
    along_outputs: bool
    order: tuple[int, ...] | None = None

    def shape(self) -> tuple[int, int]:
        """Numbers, `[out, in]`."""
        first, last = self.stored.get_shape()
        out, columns = (last, first) if self.turned else (first, last)
        each = WORD_BITS // self.bits
        return (out * each, columns) if self.along_outputs else (out, columns * each)

    def read(self, rows: Span, columns: Span) -> torch.Tensor:
        """A part of the numbers, uint8 `[out, in]`."""
        each = WORD_BITS // self.bits
        inside, other = (rows, columns) if self.along_outputs else (columns, rows)
        words_of = slice(inside[0] // each, -(-inside[1] // each))
        # The dimension along which words go is the last one here.
        if self.along_outputs == self.turned:
            words = self.stored[slice(*other), words_of]
        else:
            words = self.stored[words_of, slice(*other)].T
        order = self.order or range(each)
        shifts = torch.tensor([self.bits * place for place in order], dtype=torch.int32)
        numbers = words[..., None] >> shifts & (1 << self.bits) - 1
        first = words_of.start * each
        numbers = numbers.flatten(1)[:, inside[0] - first : inside[1] - first]
        read: torch.Tensor = (numbers.T if self.along_outputs else numbers).to(torch.uint8)
        return read


@dataclass(frozen=True, eq=False)
class GroupedTensor(Blocks):
    """A matrix of whole numbers, or the part of it within `rows` and `columns`: a value is
    (number - zero) * scale, these two of its group of inputs. Without `zeros` the middle is 0."""

    numbers: Words
    scales: Any
    zeros: Words | None
    above: int
    group: int

    def dense(self) -> torch.Tensor:
        return _by_rows(self, GroupedTensor._values)

    def packed(self) -> torch.Tensor:
        return _by_rows(self, GroupedTensor._blocks)

    def _values(self) -> torch.Tensor:
        numbers = self.numbers.read(self.rows, self.columns).float()
        scales, zeros = (self._each(part, 1) for part in self._groups())
        return (numbers - zeros) * scales

    def _blocks(self) -> torch.Tensor:
        rows = self.shape[0]
        numbers = self.numbers.read(self.rows, self.columns).reshape(rows, -1, BLOCK)
        scales, zeros = (self._each(part, BLOCK) for part in self._groups())
        parts = [_halves(scales)]
        if self.numbers.bits == 4:
            low, high = numbers.chunk(2, dim=-1)
            parts += [_halves(-zeros * scales), low | high << 4]
        else:
            parts.append(numbers ^ 128)  # 128 stands for zero: see `_grouped`
        return torch.cat(parts, -1).reshape(rows, -1)

    def _groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros of the groups that the columns reach, fp32 `[out, groups]`."""
        groups = (self.columns[0] // self.group, -(-self.columns[1] // self.group))
        if self.numbers.turned:
            scales = self.scales[slice(*groups), slice(*self.rows)].T
        else:
            scales = self.scales[slice(*self.rows), slice(*groups)]
        scales = scales.float()
        if self.zeros is None:
            return scales, torch.full_like(scales, 1 << self.numbers.bits - 1)
        zeros = self.zeros.read(self.rows, groups).to(torch.int32) + self.above
        return scales, (zeros & (1 << self.numbers.bits) - 1).float()

    def _each(self, groups: torch.Tensor, unit: int) -> torch.Tensor:
        """Of every `unit` columns the group's value."""
        start = self.columns[0] % self.group // unit
        each = groups.repeat_interleave(self.group // unit, dim=1)
        return each[:, start : start + self.shape[1] // unit]


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A matrix of FP8 or int8 numbers, or the part within `spans`, each `area` (rows, columns) of
    which has a scale."""

    name: str
    format: str
    stored: Any
    scales: Any
    area: tuple[int, int]
    spans: tuple[Span, Span]

    @property
    def block(self) -> int:
        return 1 if self.format == "BF16" else BLOCK

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(last - first for first, last in self.spans)

    def narrow(self, dimension: int, start: int, length: int) -> ScaledTensor:
        spans = list(self.spans)
        first = spans[dimension][0] + start
        spans[dimension] = (first, first + length)
        return replace(self, spans=(spans[0], spans[1]))

    def dense(self) -> torch.Tensor:
        return _by_rows(self, lambda part: part._numbers().float() * part._each(1))

    def packed(self) -> torch.Tensor:
        if self.format == "BF16":
            raise ValueError(f"{self.name} is stored as floats, not in blocks")
        rows = self.shape[0]
        numbers = self._numbers().view(torch.uint8).reshape(rows, -1, BLOCK)
        return torch.cat((_halves(self._each(BLOCK)), numbers), -1).reshape(rows, -1)

    def _numbers(self) -> torch.Tensor:
        part: torch.Tensor = self.stored[tuple(slice(*span) for span in self.spans)]
        return part

    def _each(self, unit: int) -> torch.Tensor:
        """The scale of every `unit` columns, fp32 `[rows, columns / unit]`."""
        scales = self.scales[...].float().reshape(_shape_of_scales(self.scales))
        rows, columns = (torch.arange(*span) for span in self.spans)
        row, column = rows // self.area[0], columns[::unit] // self.area[1]
        each: torch.Tensor = scales[row][:, column]
        return each


class Quantized:
    """How a checkpoint's matrices are stored, from its `quantization_config`. Raises ConfigError if
    that is a way which cannot be loaded."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.method = config.get("quant_method")
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"the model is quantized with {self.method}; these work: {known}")
        self._config = config
        self._bits = config.get("bits", 4)
        if self.method in ("gptq", "awq") and self._bits not in (4, 8):
            raise ConfigError(f"the model has {self._bits} bits in {self.method}; 4 and 8 work")
        area = config.get("weight_block_size") or AREA
        if not isinstance(area, list | tuple) or [type(side) for side in area] != [int, int]:
            raise ConfigError(f"weight_block_size is {area!r}, not rows and columns")
        self._area = area
        version = config.get("version", "gemm")
        if self.method == "awq" and str(version).lower() != "gemm":
            raise ConfigError(f"the model is in AWQ's layout {version!r}; 'gemm' works")

    def plain_name(self, name: str) -> str | None:
        """What a stored tensor is called by those who ask for it; None of what only goes with
        another."""
        module, _, kind = name.rpartition(".")
        if kind in ("qweight", "weight_packed"):
            return f"{module}.weight"
        beside = ("qzeros", "scales", "g_idx", "weight_zero_point", "weight_g_idx")
        return None if kind in (*beside, *SCALES, *BESIDE) else name

    def open(self, name: str, find: Find) -> HostTensor | None:
        """A matrix by its plain name; None if it is not quantized."""
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            return None
        if (words := find(f"{module}.qweight")) is not None:
            return self._columns_first(name, module, words, find)
        if (words := find(f"{module}.weight_packed")) is not None:
            return self._compressed(name, module, words, find)
        stored = find(name)
        if stored is None or stored.get_dtype() not in (FP8, INT8):
            return None
        return _scaled(name, module, stored, find, self._area)

    def _columns_first(self, name: str, module: str, words: Any, find: Find) -> GroupedTensor:
        """GPTQ's and AWQ's tensors, which are stored turned."""
        awq = self.method == "awq"
        order = AWQ_ORDER if awq else None
        numbers = Words(words, self._bits, turned=True, along_outputs=awq, order=order)
        zeros = Words(_need(f"{module}.qzeros", find), self._bits, True, True, order)
        # The first version of GPTQ's files holds a zero less one.
        older = not awq and self._config.get("checkpoint_format", "gptq") != "gptq_v2"
        scales, order_of = _need(f"{module}.scales", find), find(f"{module}.g_idx")
        return _grouped(name, numbers, scales, zeros, int(older), order_of)

    def _compressed(self, name: str, module: str, words: Any, find: Find) -> GroupedTensor:
        if words.get_dtype() != "I32":
            form = self._config.get("format")
            raise ConfigError(f"tensor {name!r} is in format {form!r}, which cannot be loaded")
        shape = _need(f"{module}.weight_shape", find)[...].flatten().tolist()
        bits = next((b for b in (4, 8) if _fits(words.get_shape(), shape, WORD_BITS // b)), None)
        if bits is None:
            raise ConfigError(
                f"tensor {name!r} of {shape} is in words of {words.get_shape()}, which are neither "
                "4 nor 8 bits of each"
            )
        numbers = Words(words, bits, turned=False, along_outputs=False)
        stored = find(f"{module}.weight_zero_point")
        zeros = (
            Words(stored, bits, turned=False, along_outputs=True) if stored is not None else None
        )
        scales, order = _need(f"{module}.weight_scale", find), find(f"{module}.weight_g_idx")
        return _grouped(name, numbers, scales, zeros, 0, order)


def _grouped(
    name: str, numbers: Words, scales: Any, zeros: Words | None, above: int, order: Any
) -> GroupedTensor:
    """The whole tensor, once its parts are known to belong together."""
    for part in (numbers.stored, scales, *([zeros.stored] if zeros is not None else [])):
        words = part is not scales
        if len(part.get_shape()) != 2 or (part.get_dtype() == "I32") != words:
            raise ConfigError(
                f"tensor {name!r} has parts of {part.get_dtype()} {part.get_shape()}, not matrices "
                "of int32 words and their scales"
            )
    out, columns = numbers.shape()
    shape = scales.get_shape()
    groups = shape[0] if numbers.turned else shape[1]
    group = columns // max(groups, 1)
    if group * groups != columns or group % BLOCK or not group:
        raise ConfigError(
            f"tensor {name!r} has {groups} groups for {columns} inputs; groups of multiples of "
            f"{BLOCK} can be loaded"
        )
    rows = shape[1] if numbers.turned else shape[0]
    # Words of zeros may have room for more outputs than there are.
    room = zeros.shape() if zeros is not None else (rows, groups)
    if rows != out or room[1] != groups or not out <= room[0] < out + WORD_BITS:
        raise ConfigError(
            f"tensor {name!r} of {out} outputs in {groups} groups has scales for {rows}, zeros for "
            f"{room[0]} in {room[1]}"
        )
    _check_order(name, group, order)
    kind, rest = "Q4_1" if numbers.bits == 4 else "Q8_0", (scales, zeros, above, group)
    tensor = GroupedTensor(name, kind, (0, out), (0, columns), numbers, *rest)
    if numbers.bits == 8 and not bool((tensor._groups()[1] == 128).all()):
        raise ConfigError(f"tensor {name!r} has 8 bits, and others than 128 stand for zero")
    return tensor


def _fits(words: Sequence[int], shape: Sequence[int], each: int) -> bool:
    return len(words) == len(shape) == 2 and list(shape) == [words[0], words[1] * each]


def _by_rows(tensor: AnyTensor, read: Callable[[AnyTensor], torch.Tensor]) -> torch.Tensor:
    """A few rows at a time, since what reading takes is many times what it leaves."""
    rows, columns = tensor.shape
    step = max(1, AT_ONCE // max(columns, 1))
    pieces = [read(tensor.narrow(0, n, min(step, rows - n))) for n in range(0, rows, step)]
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _scaled(name: str, module: str, stored: Any, find: Find, area: Sequence[int]) -> ScaledTensor:
    found = [scale for kind in SCALES if (scale := find(f"{module}.{kind}")) is not None]
    if not found:
        raise ConfigError(f"tensor {name!r} is stored as {stored.get_dtype()} without its scales")
    rows, columns = stored.get_shape()
    down, across = _shape_of_scales(found[0])
    sides = _side(rows, down, area[0]), _side(columns, across, area[1])
    if -(-rows // sides[0]) != down or -(-columns // sides[1]) != across:
        raise ConfigError(f"tensor {name!r} of {rows} x {columns} has {down} x {across} scales")
    kind = "BF16" if stored.get_dtype() == FP8 else "Q8_0"
    if kind == "Q8_0" and (across != 1 or columns % BLOCK):
        raise ConfigError(f"tensor {name!r} of int8 has no one scale a row of whole blocks")
    zeros = find(f"{module}.weight_zero_point")
    if zeros is not None and bool(zeros[...].any()):
        raise ConfigError(f"tensor {name!r} has zero points beside 0, which cannot be loaded")
    return ScaledTensor(name, kind, stored, found[0], sides, ((0, rows), (0, columns)))


def _side(size: int, parts: int, several: int) -> int:
    """How many rows or columns have a scale together: all, each by itself, or `several`."""
    return max(size, 1) if parts == 1 else 1 if parts == size else several


def _shape_of_scales(scales: Any) -> tuple[int, int]:
    """One for all, one for each row, or one for each area."""
    shape = list(scales.get_shape())
    rows, columns = ([*shape, 1, 1] if len(shape) < 2 else shape)[:2]
    return rows, columns


def _check_order(name: str, group: int, order: Any) -> None:
    if order is None:
        return
    groups = order[:]
    if not torch.equal(groups.long(), torch.arange(len(groups)) // group):
        raise ConfigError(
            f"tensor {name!r} has its inputs grouped by activation (desc_act), which cannot be "
            "loaded; take a file that was made without"
        )


def _need(name: str, find: Find) -> Any:
    stored = find(name)
    if stored is None:
        raise ConfigError(f"the model has no tensor {name!r}")
    return stored


def _halves(values: torch.Tensor) -> torch.Tensor:
    """fp16 bytes, `[..., 2]`."""
    return values.to(torch.float16)[..., None].view(torch.uint8)
