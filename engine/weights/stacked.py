"""Experts that a file holds in one tensor for all of them, under each one's names.

gpt-oss's floats lie as `gate_up_proj` `[experts, hidden, 2 wide]` and `down_proj` `[experts, wide,
hidden]`, gate and up outputs in turns; Qwen's with gates in front of ups, as outputs x inputs
(Qwen 3.5) or as inputs x outputs (Qwen3-VL). gpt-oss's MXFP4 (OCP's microscaling formats, arXiv
2310.10537) has `_blocks`, uint8 `[experts, out, groups, 16]` of two numbers each, and uint8
`_scales`, one of each group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ConfigError
from engine.weights.blocks import Blocks
from engine.weights.checkpoint import MAX_EXPERTS
from kernels.backend import HostTensor

METHOD = "mxfp4"
GPT_OSS = "gpt_oss"
# Families whose files may have stacks.
STACKING = (GPT_OSS, "qwen3_moe", "qwen3_5_moe_text", "gemma4_text")
STACK_DIMENSIONS = 3
FLOATS = ("F32", "F16", "BF16")
BLOCK = 32
STACK = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj(|_bias|_blocks|_scales)")
# What each stack holds, outputs of several in turns.
PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
Find = Callable[[str], Any]
"""A stored tensor's slice by its name, or None."""


@dataclass(frozen=True, eq=False)
class Stacked(Blocks):
    """One projection of one expert: of the outputs every `turns`-th from `turn` on."""

    stored: Any
    expert: int
    turn: int
    turns: int

    def dense(self) -> torch.Tensor:
        part: torch.Tensor = self.stored[self.expert, slice(*self.columns), self._outputs()]
        return part[:, self.turn :: self.turns].T

    def packed(self) -> torch.Tensor:
        raise ValueError(f"{self.name} is stored as {self.format}, not in blocks")

    def _outputs(self) -> slice:
        """The stored outputs among which these are."""
        return slice(self.rows[0] * self.turns, self.rows[1] * self.turns)


@dataclass(frozen=True, eq=False)
class StackedBias(Stacked):
    """What is added to the outputs, `[experts, out]` in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows[1] - self.rows[0],)

    def dense(self) -> torch.Tensor:
        part: torch.Tensor = self.stored[self.expert, self._outputs()]
        return part[self.turn :: self.turns]


@dataclass(frozen=True, eq=False)
class StackedBlocks(Stacked):
    """A projection in MXFP4, as ggml's blocks: a scale, and numbers of which a byte's low half is
    one of the first sixteen."""

    scales: Any

    def packed(self) -> torch.Tensor:
        groups = slice(self.columns[0] // BLOCK, self.columns[1] // BLOCK)
        place = (self.expert, self._outputs(), groups)
        pairs: torch.Tensor = self.stored[place][self.turn :: self.turns]
        scales: torch.Tensor = self.scales[place][self.turn :: self.turns]
        numbers = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
        low, high = numbers.chunk(2, -1)
        return torch.cat((scales[..., None], low | high << 4), -1).flatten(1)

    def dense(self) -> torch.Tensor:
        return torch.from_numpy(dequantize(self.packed().numpy(), GGMLQuantizationType.MXFP4))


@dataclass(frozen=True, eq=False)
class StackedHalf(Blocks):
    """One projection of one expert, whose outputs follow the first `first`; `turned` if the file
    has inputs x outputs."""

    stored: Any
    expert: int
    first: int
    turned: bool

    def dense(self) -> torch.Tensor:
        rows = slice(self.first + self.rows[0], self.first + self.rows[1])
        columns = slice(*self.columns)
        place = (self.expert, columns, rows) if self.turned else (self.expert, rows, columns)
        part: torch.Tensor = self.stored[place]
        return part.T if self.turned else part

    def packed(self) -> torch.Tensor:
        raise ValueError(f"{self.name} is stored as {self.format}, not in blocks")


class StackedExperts:
    """The experts of a file's stacks. Raises ConfigError if there is no saying how many."""

    def __init__(self, names: Iterable[str], config: dict[str, Any]) -> None:
        self._stacks: set[str] = set()
        self._places: dict[str, tuple[str, int, int, int]] = {}
        self._gpt_oss = config.get("model_type") == GPT_OSS
        self._hidden = config.get("hidden_size")
        # Versions of `transformers` call it either.
        keys = ("num_local_experts", "num_experts")
        key = next((key for key in keys if config.get(key) is not None), keys[0])
        self._count = config.get(key)
        for name in names if config.get("model_type") in STACKING else ():
            found = STACK.fullmatch(name)
            if found is None or (found[3] and not self._gpt_oss):
                continue
            self._stacks.add(name)
            block, kind, suffix = found.groups()
            if suffix == "_scales":
                continue
            count = self._count
            if type(count) is not int or not 0 < count <= MAX_EXPERTS:
                raise ConfigError(f"the model's configuration has {key} = {count!r}")
            last, parts = "bias" if suffix == "_bias" else "weight", PARTS[kind]
            for expert in range(count):
                for turn, part in enumerate(parts):
                    place = (name, expert, turn, len(parts))
                    self._places[f"{block}.{expert}.{part}.{last}"] = place

    def names(self, names: Iterable[str]) -> set[str]:
        """A file's names, with each expert's in place of the stacks'."""
        return (set(names) - self._stacks) | set(self._places)

    def open(self, name: str, find: Find) -> HostTensor | None:
        """An expert's tensor by its name; None if it is in no stack. Raises ConfigError if the
        stack cannot be such a one."""
        if name not in self._places:
            return None
        whole, expert, turn, turns = self._places[name]
        stored = find(whole)
        shape, dtype = stored.get_shape(), stored.get_dtype()
        if not self._gpt_oss:
            return self._half(name, whole, stored, expert, turn, turns)
        bias, blocks = whole.endswith("_bias"), whole.endswith("_blocks")
        place = (expert, turn, turns)
        if blocks:
            outputs = shape[1] if len(shape) > 1 else 0
            scales = find(whole.removesuffix("_blocks") + "_scales")
            fits = dtype == "U8" and _belong_together(shape, scales)
        else:
            fits = dtype in FLOATS and len(shape) == (2 if bias else 3)
            outputs = shape[-1] if fits else 0
        if not fits or shape[0] != self._count or outputs % turns:
            raise ConfigError(f"tensor {whole!r} is {dtype} {shape}, which are no stacked experts")
        rows = (0, outputs // turns)
        if bias:
            return StackedBias(name, dtype, rows, (0, 0), stored, *place)
        if blocks:
            columns = (0, shape[2] * BLOCK)
            return StackedBlocks(name, "MXFP4", rows, columns, stored, *place, scales)
        return Stacked(name, dtype, rows, (0, shape[1]), stored, *place)

    def _half(
        self, name: str, whole: str, stored: Any, expert: int, turn: int, turns: int
    ) -> HostTensor:
        """A projection that lies behind others of its expert."""
        shape, dtype = stored.get_shape(), stored.get_dtype()
        if dtype not in FLOATS or len(shape) != STACK_DIMENSIONS or shape[0] != self._count:
            raise ConfigError(f"tensor {whole!r} is {dtype} {shape}, which are no stacked experts")
        # Of gate and up the inputs are the model's width, of down the outputs.
        turned = shape[2 if turns > 1 else 1] != self._hidden
        inputs, outputs = shape[1:] if turned else reversed(shape[1:])
        size = outputs // turns
        columns = (0, inputs)
        return StackedHalf(name, dtype, (0, size), columns, stored, expert, turn * size, turned)


def _belong_together(blocks: list[int], scales: Any) -> bool:
    """Whether blocks of this shape have these scales, one each."""
    if scales is None or scales.get_dtype() != "U8":
        return False
    return bool(blocks == [*scales.get_shape(), BLOCK // 2])
