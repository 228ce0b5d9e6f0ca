"""How the kernels between matmuls are compiled for rows of some width."""

from __future__ import annotations

from kernels.gpu import experts, fused
from kernels.gpu.launch import Config, power_of_two
from kernels.gpu.matmul import Form, values_kernel
from kernels.ops import Activation, Heads

MAX_BLOCK = 4096
# Heads of a token that one program rotates: starting many programs costs more than what they do.
ROPE_HEADS, ROPE_VALUES = 16, 4096


def blocks_of(width: int, most: int = MAX_BLOCK) -> tuple[int, int]:
    """How a row is cut: the size of a block, `most` at most, and how many there are."""
    block = min(power_of_two(width), most)
    return block, -(-width // block)


def _warps(block: int) -> int:
    """Warps of a program that handles so many elements: 8 or more a thread."""
    return max(1, min(16, block // 256))


def embed_config(width: int, form: Form) -> tuple[Config, int]:
    """The lookup in a table of this form, and the blocks of its rows."""
    block, count = blocks_of(width)
    sizes = {"WIDTH": width, "BLOCK": block}
    if form.format == "float":
        return Config(fused.embed_kernel, sizes, _warps(block)), count
    kernel = fused.embed_numbers_kernel
    return Config(kernel, {**sizes, **form.constants}, _warps(block)), count


def values_config(inputs: int, form: Form) -> tuple[Config, int]:
    """A weight of this form as floats, and the blocks of its rows."""
    block, count = blocks_of(inputs)
    sizes = {**form.constants, "INPUTS": inputs, "BLOCK": block}
    if form.format == "group4":
        # Half words, of which each thread takes 16 bytes.
        sizes["STRIDE"] = form.stride * 2
        return Config(values_kernel, sizes, max(1, block // 1024)), count
    return Config(values_kernel, sizes, _warps(block)), count


def norm_config(width: int, *, add: bool) -> Config:
    """A norm over rows of this width."""
    block = power_of_two(width)
    return Config(fused.norm_kernel, {"WIDTH": width, "BLOCK": block, "ADD": add}, _warps(block))


def quantize_config(width: int) -> Config:
    """Int8 rows of this width."""
    block = power_of_two(width)
    return Config(fused.quantize_kernel, {"WIDTH": width, "BLOCK": block}, _warps(block))


def rope_config(
    heads: Heads,
    *,
    norms: bool,
    quantized: bool,
    grows: bool = False,
    value_norm: bool = False,
    whole: Heads | None = None,
) -> tuple[Config, int]:
    """Rotation and the cache's writes, and the blocks of a row's heads."""
    count = heads.query + 2 * heads.kv
    block = min(ROPE_HEADS, power_of_two(count), max(1, ROPE_VALUES // power_of_two(heads.dim)))
    constants = {
        "QUERY_HEADS": heads.query,
        "KV_HEADS": heads.kv,
        "DIM": heads.dim,
        "HEADS": block,
        "BLOCK": power_of_two(heads.dim // 2),
        "NORMS": norms,
        "VALUE_NORM": value_norm,
        "GROWS": grows,
        "QUANTIZED": quantized,
        "WHOLE_QUERIES": whole.query if whole is not None else 0,
        "WHOLE_KEYS": whole.kv if whole is not None else 0,
        "SQUARES": power_of_two(whole.query) if whole is not None else 1,
    }
    warps = _warps(block * power_of_two(heads.dim))
    return Config(fused.rope_write_kernel, constants, min(4, warps)), -(-count // block)


def head_squares_config(heads: Heads, *, keys: bool) -> Config:
    """Sums of squares of a row's heads."""
    constants = {
        "QUERY_HEADS": heads.query,
        "KV_HEADS": heads.kv,
        "DIM": heads.dim,
        "BLOCK": power_of_two(heads.dim),
        "KEYS": keys,
    }
    return Config(fused.head_squares_kernel, constants, 1)


def gated_config(width: int, activation: Activation) -> tuple[Config, int]:
    """A gate of this width, and the blocks of its rows."""
    block, count = blocks_of(width)
    constants = {"WIDTH": width, "BLOCK": block, "ACTIVATION": activation}
    return Config(fused.gated_kernel, constants, _warps(block)), count


def select_config(width: int) -> tuple[Config, int]:
    """A gather of rows, and their blocks."""
    block, count = blocks_of(width)
    return Config(fused.select_kernel, {"WIDTH": width, "BLOCK": block}, _warps(block)), count


def gather_config(width: int) -> tuple[Config, int]:
    """A gather of rows by expert, and their blocks."""
    block, count = blocks_of(width)
    return Config(experts.gather_kernel, {"WIDTH": width, "BLOCK": block}, _warps(block)), count


def scatter_config(width: int) -> tuple[Config, int]:
    """Experts' rows back to where they came from, and their blocks."""
    block, count = blocks_of(width)
    return Config(experts.scatter_kernel, {"WIDTH": width, "BLOCK": block}, _warps(block)), count


def sum_parts_config(width: int, parts: int) -> tuple[Config, int]:
    """The sum of a row's parts, and its blocks."""
    block, count = blocks_of(width)
    sizes = {"WIDTH": width, "BLOCK": block, "PARTS": parts}
    return Config(experts.sum_parts_kernel, sizes, _warps(block)), count
