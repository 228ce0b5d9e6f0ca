"""Every kernel that a model's steps launch, with the types it is compiled for.

This is what is compiled where there is no GPU, and checked: registers, spills, instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kernels.gpu.attention import AttentionShape
from kernels.gpu.catalogue_families import (
    delta_launches,
    expert_launches,
    gemma_launches,
    gpt_oss_launches,
    latent_launches,
    olmo_launches,
)
from kernels.gpu.configs import (
    embed_config,
    gated_config,
    norm_config,
    quantize_config,
    select_config,
    values_config,
)
from kernels.gpu.launch import Compiled, Config, pointer
from kernels.gpu.matmul import Form, MatmulShape
from kernels.gpu.pages import compress_kernel, restore_kernel
from kernels.gpu.row_ops import RowShape
from kernels.gpu.sampling import BLOCK, WARPS, SamplerShape, penalize_kernel
from kernels.gpu.signatures import (
    BF16,
    F16,
    F32,
    FORMATS,
    INT8,
    INT16,
    INT32,
    INT64,
    PAGE,
    arguments_of,
    attention_launches,
    matmul_launch,
    named,
    rope_launch,
)
from kernels.gpu.weights import INT4_GROUP
from kernels.ops import Heads


@dataclass(frozen=True)
class Dimensions:
    """A model's sizes, as far as kernels are compiled for them."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: Heads
    vocab: int
    norms: bool = False
    tied: bool = False


LLAMA_1B = Dimensions("Llama-3.2-1B", 2048, 8192, 16, Heads(32, 8, 64), 128256, tied=True)
QWEN_06B = Dimensions(
    "Qwen3-0.6B", 1024, 3072, 28, Heads(16, 8, 128), 151936, norms=True, tied=True
)
LLAMA_8B = Dimensions("Llama-3.1-8B", 4096, 14336, 32, Heads(32, 8, 128), 128256)
# Groups of 4-bit weights, and whether they have zeros: of GGUF files, and of our own.
FOURS = ((32, False), (128, True))
MODELS = (LLAMA_1B, QWEN_06B, LLAMA_8B)


def row_launches(model: Dimensions, *, hopper: bool) -> Iterator[Compiled]:
    """A row's matmuls, with everything that can stand around them."""
    shapes = {
        "qkv": (model.heads.qkv_width, model.hidden, True, False, ""),
        "o": (model.hidden, model.heads.query * model.heads.dim, False, True, ""),
        "gate_up": (model.intermediate, model.hidden, True, False, "silu"),
        "down": (model.hidden, model.intermediate, False, True, ""),
        "head": (model.vocab, model.hidden, False, False, ""),
        # Of other models: rows that no block divides, and long ones.
        "odd": (1000, 576, True, True, ""),
        "long": (8192, 28672, False, True, ""),
    }
    signature = {
        **dict.fromkeys(("out", "x", "weight", "bias", "residual"), pointer(BF16)),
        **dict.fromkeys(("norm", "steps", "totals"), pointer(F32)),
        "digits": pointer(INT32),
        "scales": pointer(F16),
        "eps": "fp32",
        "outputs": "i32",
        "groups": "i32",
        "inputs": "i32",
    }
    for name, (outputs, inputs, norm, add, activation) in shapes.items():
        words = -(-inputs // 128) * 16
        forms = [Form("float"), *(Form("group4", words, g, z, words * 8 // g) for g, z in FOURS)]
        for form in forms:
            shape = RowShape(outputs, inputs, form, False, norm, add, activation, True, hopper)
            config, kind = shape.config(), str(form.format)
            if kind == "group4":
                kind += f"/{form.group}"
                lows = pointer(BF16 if form.zeros else F16)
                digits = shape.digits_config()[0]
                types = {**signature, "digits": pointer(INT8)}
                yield named(f"digits {name}", digits, types, ("inputs",))
            types = {**signature, "weight": pointer(BF16)}
            if form.format == "group4":
                types |= {"weight": pointer(INT32), "bias": pointer(INT32), "lows": lows}
            if name == "head":
                types["out"] = pointer(F32)
            yield named(f"row {kind} {name}", config, types, ("outputs",))
            if name == "qkv" and not model.norms:
                heads = replace(shape, heads=model.heads).config()
                places = dict.fromkeys(("keys", "values"), pointer(BF16))
                places |= dict.fromkeys(("positions", "slots"), pointer(INT32))
                places |= dict.fromkeys(("cosine", "sine", "growth"), pointer(F32))
                yield named(f"row {kind} heads", heads, {**types, **places, "apart": "i32"})


def values_launches(model: Dimensions) -> Iterator[Compiled]:
    """Weights in groups, as floats for many rows."""
    for kind, group, zeros in (("group8", 32, False), *(("group4", g, z) for g, z in FOURS)):
        four = kind == "group4"
        stride = model.hidden // (8 if four else 1)
        form = Form(kind, stride, group, zeros, model.hidden // group)  # type: ignore[arg-type]
        types = {
            "out": pointer(BF16),
            "weight": pointer(INT16 if four else INT8),
            "scales": pointer(F16),
            "lows": pointer(BF16 if zeros else F16),
            "first": "i32",
        }
        yield named(f"values {kind}/{group}", values_config(model.hidden, form)[0], types)


def fused_launches(model: Dimensions, *, quantized: bool) -> Iterator[Compiled]:
    """Norms, rotation, gate and gather of a model."""
    row = {"out": pointer(BF16), "total": pointer(BF16), "x": pointer(BF16)}
    signature = {**row, "residual": pointer(BF16), "weight": pointer(F32)}
    signature |= {"eps": "fp32", "scale": "fp32"}
    yield Compiled("add_rms_norm", norm_config(model.hidden, add=True), signature)
    yield Compiled("rms_norm", norm_config(model.hidden, add=False), signature)
    numbers = {"out": pointer(INT8), "scales": pointer(F32), "x": pointer(BF16)}
    yield Compiled("quantize", quantize_config(model.intermediate), numbers)
    label = "int8" if quantized else "bf16"
    for grows in (False, True):
        name = f"{label} grows" if grows else label
        yield rope_launch(model.heads, name, norms=model.norms, quantized=quantized, grows=grows)
    pair = {"out": pointer(BF16), "x": pointer(BF16)}
    yield Compiled("gated", gated_config(model.intermediate, "silu")[0], pair)
    for width in {model.hidden, model.heads.query * model.heads.dim}:
        config = select_config(width)[0]
        yield Compiled(f"select_rows {width}", config, {**pair, "sample_rows": pointer(INT32)})


def embed_launches(model: Dimensions) -> Iterator[Compiled]:
    """The lookup in a table, as float and in groups of 8 bits."""
    inputs = {
        "token_ids": pointer(INT32),
        "last_ids": pointer(INT64),
        "slots": pointer(INT32),
        "fed": pointer(INT32),
        "scale": "fp32",
        "rows": "i32",
        "first": "i32",
    }
    tables = {"out": pointer(BF16), "table": pointer(BF16)}
    yield Compiled("embed", embed_config(model.hidden, Form("float"))[0], {**tables, **inputs})
    tables |= {"table": pointer(INT8), "scales": pointer(F16), "lows": pointer(F16)}
    width = model.hidden
    config = embed_config(width, Form("group8", width, 32, groups=width // 32))[0]
    yield Compiled("embed group8", config, {**tables, **inputs}, ("rows",))
    tables |= {"table": pointer(INT32)}
    config = embed_config(width, Form("group4", width // 8, 32, groups=width // 32))[0]
    yield Compiled("embed group4", config, {**tables, **inputs}, ("rows",))
    tables |= {"table": pointer(INT8), "scales": pointer(F32), "lows": pointer(INT8)}
    config = embed_config(width, Form("int8", width))[0]
    yield Compiled("embed int8", config, {**tables, **inputs}, ("rows",))


def sampling_launches(vocab: int, rows: int) -> Iterator[Compiled]:
    """Every kernel of a draw, and the penalties."""
    types: dict[str, str] = {
        **dict.fromkeys(("counts", "targets", "slots", "top_k", "keys", "partial_ids"), "*i32"),
        **dict.fromkeys(("masses", "above", "ids", "last_ids"), "*i64"),
    }
    shape = SamplerShape(rows, vocab)
    for config in [*shape.configs(filtered=True), *shape.configs(filtered=False)]:
        yield _typed(config, types)
    constants = {"VOCAB": vocab, "BLOCK": BLOCK}
    yield _typed(
        Config(penalize_kernel, constants, WARPS), {"rows": "*i64", "counts": "*i32", "seen": "*i8"}
    )


def page_launches(model: Dimensions) -> Iterator[Compiled]:
    """A page as int8, and back."""
    types = {"numbers": "*i8", "steps": "*fp32", "cache": "*bf16", "page": "i32", "pages": "i32"}
    dim = model.heads.dim
    constants = {"VECTORS": PAGE * model.heads.kv, "DIM": dim, "BLOCK": dim}
    for kernel in (compress_kernel, restore_kernel):
        yield Compiled(kernel.__name__.removesuffix("_kernel"), Config(kernel, constants, 1), types)


def _typed(config: Config, types: dict[str, str]) -> Compiled:
    """A kernel whose arguments are all pointers, fp32 if not said otherwise."""
    level = config.constants.get("LEVEL")
    label = config.kernel.__name__.removesuffix("_kernel")
    label = label if level is None else f"{label} {level}"
    return Compiled(label, config, {n: types.get(n, pointer(F32)) for n in arguments_of(config)})


def launches(
    model: Dimensions, rows: tuple[int, ...] = (1, 16, 64, 512), *, hopper: bool = True
) -> list[Compiled]:
    """All of a model's launches, at these sizes of batch."""
    made: list[Compiled] = []
    for quantized in (False, True):
        made += fused_launches(model, quantized=quantized)
        cache = "int8" if quantized else "bf16"
        for count in rows:
            for decode in (True, False):
                if (decode and count > 64) or (not decode and count < 64):
                    continue
                sequences = count if decode else 64
                shape = AttentionShape(
                    model.heads,
                    PAGE,
                    BF16,
                    quantized,
                    False,
                    count,
                    sequences,
                    decode,
                    False,
                    hopper,
                )
                kind = "decode" if decode else "mixed"
                made += attention_launches(shape, f"{kind} {cache} {count}")
    widths: dict[str, tuple[int, int]] = {
        "qkv": (model.heads.qkv_width, model.hidden),
        "down": (model.hidden, model.intermediate),
    }
    for kind, group in FORMATS:
        for name, (outputs, inputs) in widths.items():
            for count in (1, 64, 512):
                invariant = kind == "float"
                shape_ = MatmulShape(
                    count,
                    outputs,
                    inputs,
                    kind,
                    group,
                    BF16,
                    bias=False,
                    invariant=invariant,
                    hopper=hopper,
                    zeros=group == INT4_GROUP,
                    inline=True,
                )
                label = f"{kind}{f'/{group}' if group > 1 else ''} {name} {count}"
                made.append(matmul_launch(shape_, label))
    for decode in (True, False):
        window = AttentionShape(model.heads, PAGE, BF16, False, True, 64, 64, decode, hopper=hopper)
        made += attention_launches(window, f"{'decode' if decode else 'mixed'} window 64")
    few = [(name, MatmulShape(4, *size, "float", 1, BF16, False)) for name, size in widths.items()]
    made += [matmul_launch(shape, f"float {name} 4") for name, shape in few]
    made += row_launches(model, hopper=hopper)
    made += values_launches(model)
    made += expert_launches(hopper=hopper)
    made += gpt_oss_launches(hopper=hopper)
    made += delta_launches()
    made += gemma_launches(hopper=hopper)
    made += latent_launches(hopper=hopper)
    made += olmo_launches()
    made += embed_launches(model)
    made += sampling_launches(model.vocab, 64)
    made += page_launches(model)
    return _distinct(made)


def _distinct(made: list[Compiled]) -> list[Compiled]:
    """Without those that are compiled alike."""
    seen: dict[Any, Compiled] = {}
    for one in made:
        config = one.config
        key = (
            config.kernel.__name__,
            tuple(sorted(config.constants.items())),
            tuple(one.signature.items()),
            config.warps,
            config.stages,
        )
        seen.setdefault(key, one)
    return list(seen.values())
