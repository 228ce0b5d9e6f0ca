"""Types that kernels are compiled for, of launches that several kinds of model have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.gpu.attention import AttentionShape
from kernels.gpu.configs import rope_config
from kernels.gpu.launch import Compiled, Config, pointer
from kernels.gpu.matmul import FOUR_BITS, Format, MatmulShape
from kernels.gpu.weights import INT4_GROUP
from kernels.ops import Heads

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INT8, INT16, INT32, INT64 = torch.int8, torch.int16, torch.int32, torch.int64
# Formats of matrices, and inputs of a scale.
FORMATS: tuple[tuple[Format, int], ...] = (
    ("int8", 1), ("group8", 32), ("group4", 32), ("group4", INT4_GROUP), ("float", 1),
)  # fmt: skip
PAGE = 16


def attention_launches(shape: AttentionShape, label: str) -> Iterator[Compiled]:
    """The attention kernel of a shape, and its merging one."""
    main, merge = shape.configs()
    dtype, cache = shape.dtype, INT8 if shape.quantized else shape.dtype
    scales = pointer(F32 if shape.quantized else cache)
    signature = {
        "out": pointer(dtype),
        "partial": pointer(F32),
        "partial_sums": pointer(F32),
        "queries": pointer(dtype),
        "keys": pointer(cache),
        "values": pointer(cache),
        "key_scales": scales,
        "value_scales": scales,
        "query_starts": pointer(INT32),
        "context_lengths": pointer(INT32),
        "page_table": pointer(INT32),
        "sinks": pointer(F32 if shape.sinks else dtype),
        "scale": "fp32",
        "window": "i32",
        "sequences": "i32",
        "table_width": "i32",
    }
    yield Compiled(f"attention {label}", main, signature)
    if merge is not None:
        signature = {
            "out": pointer(dtype),
            "partial": pointer(F32),
            "partial_sums": pointer(F32),
            "query_starts": pointer(INT32),
            "sinks": pointer(F32 if shape.sinks else dtype),
            "sequences": "i32",
        }
        yield Compiled(f"merge {label}", merge, signature)


def matmul_launch(shape: MatmulShape, label: str, out: torch.dtype = BF16) -> Compiled:
    """A matmul of a shape."""
    # Of 4 bits it takes halves of words.
    eight = ("int8", "group8")
    stored = INT16 if shape.format in FOUR_BITS else INT8 if shape.format in eight else shape.dtype
    scales = {"float": shape.dtype, "float4": BF16, "int8": F32}.get(shape.format, F16)
    lows = BF16 if shape.zeros else F16 if shape.format in ("group8", "group4") else stored
    x = INT8 if shape.format == "int8" else shape.dtype
    signature = {
        "out": pointer(out),
        "x": pointer(x),
        "x_scales": pointer(F32 if shape.format == "int8" else x),
        "weight": pointer(stored),
        "scales": pointer(scales),
        "lows": pointer(lows),
        "bias": pointer(F32 if shape.bias else stored),
        "partial": pointer(F32),
        "arrived": pointer(INT32),
        "experts": pointer(INT32),
        "rows": "i32",
        "outputs": "i32",
        "inputs": "i32",
        "stride": "i32",
        "groups": "i32",
    }
    return Compiled(f"matmul {label}", shape.config(), signature, ("outputs", "inputs", "stride"))


def named(
    label: str, config: Config, types: dict[str, str], aligned: tuple[str, ...] = ()
) -> Compiled:
    """A launch whose arguments are among `types`."""
    names = arguments_of(config)
    return Compiled(
        label, config, {n: types[n] for n in names}, tuple(n for n in aligned if n in names)
    )


def arguments_of(config: Config) -> list[str]:
    """A kernel's arguments but those that are fixed when it is compiled."""
    return [n for n in config.kernel.arg_names if n not in config.constants and n != "EARLY"]


def rope_launch(
    heads: Heads,
    label: str,
    *,
    norms: bool = True,
    quantized: bool = False,
    grows: bool = False,
    value_norm: bool = False,
    whole: Heads | None = None,
) -> Compiled:
    """Rotation, and the cache's writes."""
    cache = pointer(INT8 if quantized else BF16)
    scales = pointer(F32 if quantized else BF16)
    floats = ("cosine", "sine", "query_norm", "key_norm", "value_norm", "growth", "squares")
    types = {
        **dict.fromkeys(("keys", "values"), cache),
        **dict.fromkeys(("key_scales", "value_scales"), scales),
        **dict.fromkeys(("out", "qkv"), pointer(BF16)),
        **dict.fromkeys(("positions", "slots"), pointer(INT32)),
        **dict.fromkeys(floats, pointer(F32)),
        "eps": "fp32",
    }
    config, _ = rope_config(
        heads, norms=norms, quantized=quantized, grows=grows, value_norm=value_norm, whole=whole
    )
    return named(f"rope_write_kv {label}", config, types)
