"""A tape for one row: what stands before and behind a matmul becomes part of it.

A norm goes into the matmul that alone reads it; a gate, and the rotation of heads, into the one
that it alone reads; the sum with the residual into the one that makes its other part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kernels.ops import Weight
from kernels.tape import Handle, Instruction

Step = tuple[Instruction, tuple[int, ...]]


def fuse(
    steps: Sequence[Step],
    kept: set[int],
    fits: Callable[[Weight], bool],
    fits_heads: Callable[[int], bool],
) -> list[Step]:
    """The steps with `row_linear(x, weight, norm, eps, residual, activation)` in place of each
    linear whose weight `fits`, or, where heads are rotated alone behind it and their layer
    `fits_heads`, `row_heads(x, weight, norm, eps, layer, heads, rope)`; values in `kept` are
    needed afterwards."""
    found: list[Instruction | None] = [instruction for instruction, _ in steps]
    uses = Counter(h.index for i, _ in steps for h in handles(i.arguments))
    uses.update(kept)
    made: dict[int, int] = {}
    for number, (instruction, _) in enumerate(steps):
        if instruction.op == "linear" and fits(instruction.arguments[1]):
            x, weight = instruction.arguments
            results = instruction.results
            found[number] = Instruction("row_linear", (x, weight, None, 0.0, None, ""), results)
        made.update({h.index: number for h in instruction.results})
    for number, (instruction, _) in enumerate(steps):
        if instruction.op not in ("add_rms_norm", "gated"):
            continue
        index = instruction.arguments[0].index
        source = made.get(index)
        maker = found[source] if source is not None else None
        if source is None or maker is None or maker.op != "row_linear" or uses[index] > 1:
            continue
        x, weight, *_ = maker.arguments
        if instruction.op == "gated":
            arguments = (x, weight, None, 0.0, None, instruction.arguments[1])
            found[source] = Instruction("row_linear", arguments, instruction.results)
            found[number] = None
            continue
        _, residual, norm, eps, scale = instruction.arguments
        if scale == 1.0 and made.get(residual.index, -1) < source:
            normed, total = instruction.results
            arguments = (x, weight, None, 0.0, residual, "")
            found[source] = Instruction("row_linear", arguments, (total,))
            found[number] = Instruction("rms_norm", (total, norm, eps), (normed,))
    _take_norms(found, uses)
    _rotate_heads(found, uses, fits_heads)
    return _with_ends([instruction for instruction in found if instruction is not None], kept)


def handles(arguments: Sequence[Any]) -> list[Handle]:
    """The activations among an instruction's arguments."""
    return [argument for argument in arguments if isinstance(argument, Handle)]


def _take_norms(found: list[Instruction | None], uses: Counter[int]) -> None:
    """Move each norm into the matmul that alone reads it."""
    norms = {
        instruction.results[0].index: number
        for number, instruction in enumerate(found)
        if instruction is not None
        and instruction.op == "rms_norm"
        and instruction.arguments[1].shape == (instruction.arguments[0].width,)
    }
    for number, instruction in enumerate(found):
        if instruction is None or instruction.op != "row_linear":
            continue
        x, weight, _, _, residual, activation = instruction.arguments
        source = norms.get(x.index)
        if source is None or uses[x.index] > 1:
            continue
        norm = found[source]
        assert norm is not None
        arguments = (norm.arguments[0], weight, *norm.arguments[1:], residual, activation)
        found[number] = Instruction("row_linear", arguments, instruction.results)
        found[source] = None


def _rotate_heads(
    found: list[Instruction | None], uses: Counter[int], fits: Callable[[int], bool]
) -> None:
    """Move each rotation without norms into the matmul that makes its heads."""
    made = {
        instruction.results[0].index: number
        for number, instruction in enumerate(found)
        if instruction is not None and instruction.op == "row_linear"
    }
    for number, instruction in enumerate(found):
        if instruction is None or instruction.op != "rope_write_kv":
            continue
        qkv, layer, heads, rope, norms, _ = instruction.arguments
        source = made.get(qkv.index)
        if source is None or uses[qkv.index] > 1 or norms is not None or not fits(layer):
            continue
        maker = found[source]
        assert maker is not None
        x, weight, norm, eps, _, _ = maker.arguments
        arguments = (x, weight, norm, eps, layer, heads, rope)
        found[source] = Instruction("row_heads", arguments, instruction.results)
        found[number] = None


def _with_ends(instructions: list[Instruction], kept: set[int]) -> list[Step]:
    """Each instruction with the values that nothing after it needs."""
    last: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        for handle in (*handles(instruction.arguments), *instruction.results):
            last[handle.index] = number
    return [
        (instruction, tuple(h for h, end in last.items() if end == number and h not in kept))
        for number, instruction in enumerate(instructions)
    ]
