"""Gated delta nets (arXiv 2412.06464): a state of one size for each sequence.

One program walks through a sequence's tokens with some columns of one head's memory in registers,
so pieces of any size give the same bits. What a launch is shaped by is the largest batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from kernels import ops
from kernels.gpu.launch import Config, enter, power_of_two
from kernels.gpu.pointwise import sigmoid
from kernels.ops import DeltaHeads
from kernels.reference import LayerStates

L2_EPSILON = tl.constexpr(ops.L2_EPSILON)
# Columns of a memory that a program holds, and channels that it keeps the last inputs of.
COLUMNS, CHANNELS = 32, 512


@triton.jit
def chunk_of(
    row, positions, query_starts, states, sequences, TAPS: tl.constexpr, SEQUENCES: tl.constexpr
):
    """Of a row: whether it is none of the padding, its chunk's first row, where the inputs before
    that end among the states, and whether there are some."""
    number = tl.arange(0, SEQUENCES)
    starts = tl.load(query_starts + number, mask=number < sequences, other=2147483647)
    sequence = tl.maximum(tl.sum((starts <= row).to(tl.int32), 0) - 1, 0)
    live = row < tl.load(query_starts + sequences)
    start = tl.load(query_starts + sequence)
    before = tl.load(states + sequence).to(tl.int64) * (TAPS - 1) + TAPS - 1
    return live, start, before, live & (tl.load(positions + start) > 0)


@triton.jit
def input_of(x, row, column, inside, WIDTH: tl.constexpr, GATED: tl.constexpr):
    """A row's inputs of some channels; GATED ones are products of the first and the last third."""
    if GATED:
        place = row.to(tl.int64) * (3 * WIDTH) + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(x + place + 2 * WIDTH, mask=inside, other=0.0).to(tl.float32)
    else:
        place = row.to(tl.int64) * WIDTH + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["sequences"])
def channels_kernel(
    out,
    qkv,
    inputs,
    taps,
    positions,
    query_starts,
    states,
    sequences,
    KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One head's channels of a row: the SiLU of the last inputs times `taps`; queries and keys as
    unit vectors."""
    enter(EARLY)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    live, start, before, known = chunk_of(
        row, positions, query_starts, states, sequences, TAPS, SEQUENCES
    )
    vector = head < 2 * KEYS
    first = tl.where(vector, head * KEY_DIM, 2 * KEYS * KEY_DIM + (head - 2 * KEYS) * VALUE_DIM)
    inside = column < tl.where(vector, KEY_DIM, VALUE_DIM)
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(TAPS):
        at = row - (TAPS - 1 - tap)
        here = inside & live & (at >= start)
        then = inside & known & (at < start)
        place = first + column
        now = input_of(qkv, at, place, here, WIDTH, False)
        now += tl.load(inputs + (before + at - start) * WIDTH + place, mask=then, other=0.0)
        total += now * tl.load(taps + tap * WIDTH + place, mask=inside, other=0.0)
    value = total * sigmoid(total)
    factor = tl.where(head < KEYS, SCALE, 1.0) / tl.sqrt(tl.sum(value * value, 0) + L2_EPSILON)
    value *= tl.where(vector, factor, 1.0)
    tl.store(out + row * WIDTH + first + column, value, mask=inside & live)


@triton.jit
def delta_kernel(
    out,
    memory,
    channels,
    gates,
    decay,
    offset,
    positions,
    query_starts,
    states,
    kept_rows,
    kept_at,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILED: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some columns of one head's memory, through a sequence's tokens."""
    enter(EARLY)
    sequence, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, KEY_BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row, end = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    if row < end:
        rows, columns = i < KEY_DIM, j < VALUE_DIM
        inside = rows[:, None] & columns[None, :]
        cell = i[:, None] * VALUE_DIM + j[None, :]
        size: tl.constexpr = KEY_DIM * VALUE_DIM
        place = (tl.load(states + sequence).to(tl.int64) * VALUES + head) * size + cell
        known = inside & (tl.load(positions + row) > 0)
        held = tl.load(memory + place, mask=known, other=0.0)
        kept = tl.load(kept_rows + sequence)
        keep = (tl.load(kept_at + sequence).to(tl.int64) * VALUES + head) * size + cell
        # In front of which row it is kept.
        kept = tl.where(kept < 0, -1, row + kept)
        key = head % KEYS if TILED else head // (VALUES // KEYS)
        faster = tl.load(decay + head)
        later = tl.load(offset + head)
        while row < end:
            tl.store(memory + keep, held, mask=inside & (row == kept))
            at = channels + row.to(tl.int64) * WIDTH
            q = tl.load(at + key * KEY_DIM + i, mask=rows, other=0.0)
            k = tl.load(at + (KEYS + key) * KEY_DIM + i, mask=rows, other=0.0)
            v = tl.load(at + 2 * KEYS * KEY_DIM + head * VALUE_DIM + j, mask=columns, other=0.0)
            gate = gates + row.to(tl.int64) * (2 * VALUES) + head
            share = sigmoid(tl.load(gate).to(tl.float32))
            a = tl.load(gate + VALUES).to(tl.float32) + later
            grown = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
            held *= tl.exp(-faster * grown)
            change = (v - tl.sum(held * k[:, None], 0)) * share
            held += k[:, None] * change[None, :]
            result = tl.sum(held * q[:, None], 0)
            target = out + row.to(tl.int64) * (VALUES * VALUE_DIM) + head * VALUE_DIM + j
            tl.store(target, result.to(out.dtype.element_ty), mask=columns)
            row += 1
        tl.store(memory + keep, held, mask=inside & (row == kept))
        tl.store(memory + place, held, mask=inside)


@triton.jit(do_not_specialize=["sequences"])
def short_conv_kernel(
    out,
    x,
    inputs,
    taps,
    positions,
    query_starts,
    states,
    sequences,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some channels of a row, convolved and gated."""
    enter(EARLY)
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live, start, before, known = chunk_of(
        row, positions, query_starts, states, sequences, TAPS, SEQUENCES
    )
    live, known = live & (column < WIDTH), known & (column < WIDTH)
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(TAPS):
        at = row - (TAPS - 1 - tap)
        value = input_of(x, at, column, live & (at >= start), WIDTH, True)
        place = (before + at - start) * WIDTH + column
        value += tl.load(inputs + place, mask=known & (at < start), other=0.0)
        total += value * tl.load(taps + tap * WIDTH + column, mask=column < WIDTH, other=0.0)
    place = row.to(tl.int64) * (3 * WIDTH) + WIDTH + column
    total *= tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    place = row.to(tl.int64) * WIDTH + column
    tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def inputs_kernel(
    inputs,
    qkv,
    positions,
    query_starts,
    states,
    kept_rows,
    kept_at,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The last inputs of a sequence's channels, for its next tokens and where they are to be kept.
    Every number is read before its place is written, by the same thread."""
    enter(EARLY)
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    if start < end:
        inside = column < WIDTH
        known = inside & (tl.load(positions + start) > 0)
        state = inputs + tl.load(states + sequence).to(tl.int64) * (HELD * WIDTH) + column
        kept = tl.load(kept_rows + sequence)
        keep = inputs + tl.load(kept_at + sequence).to(tl.int64) * (HELD * WIDTH) + column
        for n in tl.static_range(HELD):
            at = kept - HELD + n
            value = input_of(qkv, start + at, column, inside & (at >= 0), WIDTH, GATED)
            then = known & (at < 0) & (kept >= 0)
            value += tl.load(state + (HELD + at) * WIDTH, mask=then, other=0.0)
            tl.store(keep + n * WIDTH, value, mask=inside & (kept >= 0))
        for n in tl.static_range(HELD):
            at = end - start - HELD + n
            value = input_of(qkv, start + at, column, inside & (at >= 0), WIDTH, GATED)
            value += tl.load(state + (HELD + at) * WIDTH, mask=known & (at < 0), other=0.0)
            tl.store(state + n * WIDTH, value, mask=inside)


@triton.jit
def gated_norm_kernel(
    out,
    x,
    gate,
    weight,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The RMS norm of one part of a row, times the SiLU of its gate."""
    enter(EARLY)
    part, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = part * WIDTH + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    value *= tl.load(weight + column, mask=inside, other=0.0)
    by = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    value *= by * sigmoid(by)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


class GpuStateMoves:
    """States as they are moved: `tensors` are `[states, ...]`."""

    def __init__(self, layers: Sequence[LayerStates]) -> None:
        self._tensors = [tensor for layer in layers for tensor in layer.tensors]

    def copy(self, source: int, target: int) -> None:
        """One state to another's place, in every layer."""
        for tensor in self._tensors:
            tensor[target] = tensor[source]


@dataclass(frozen=True)
class DeltaShape:
    """What the kernels of a layer are compiled for."""

    heads: DeltaHeads
    sequences: int

    @property
    def parts(self) -> int:
        """Heads of a row: queries', keys' and values'."""
        return 2 * self.heads.key + self.heads.value

    @property
    def blocks(self) -> int:
        """Parts of a memory's columns."""
        return -(-self.heads.value_dim // COLUMNS)

    @property
    def input_blocks(self) -> int:
        """Parts of the channels."""
        return -(-self.heads.width // CHANNELS)

    def channels_config(self) -> Config:
        """Convolution of one head's channels."""
        heads = self.heads
        constants = {
            **self._sizes(),
            "TAPS": heads.taps,
            "SCALE": heads.key_dim**-0.5,
            "BLOCK": power_of_two(max(heads.key_dim, heads.value_dim)),
            "SEQUENCES": power_of_two(self.sequences),
        }
        del constants["VALUES"]
        return Config(channels_kernel, constants, 1)

    def delta_config(self) -> Config:
        """The rule, for some columns of one head."""
        constants = {
            **self._sizes(),
            "TILED": self.heads.tiled,
            "KEY_BLOCK": power_of_two(self.heads.key_dim),
            "BLOCK": COLUMNS,
        }
        return Config(delta_kernel, constants, 4)

    def inputs_config(self, *, gated: bool = False) -> Config:
        """What is kept of the channels' inputs."""
        sizes = {"WIDTH": self.heads.width, "HELD": self.heads.taps - 1, "BLOCK": CHANNELS}
        return Config(inputs_kernel, {**sizes, "GATED": gated}, 4)

    def short_conv_config(self) -> Config:
        """A short convolution of some channels."""
        constants = {
            "WIDTH": self.heads.width,
            "TAPS": self.heads.taps,
            "BLOCK": CHANNELS,
            "SEQUENCES": power_of_two(self.sequences),
        }
        return Config(short_conv_kernel, constants, 4)

    def _sizes(self) -> dict[str, int]:
        heads = self.heads
        return {
            "KEYS": heads.key,
            "VALUES": heads.value,
            "KEY_DIM": heads.key_dim,
            "VALUE_DIM": heads.value_dim,
            "WIDTH": heads.width,
        }


def gated_norm_config(width: int) -> Config:
    """Norms of parts of this width, gated."""
    return Config(gated_norm_kernel, {"WIDTH": width, "BLOCK": power_of_two(width)}, 1)
