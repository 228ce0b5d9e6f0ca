"""Launches that only some families of models have: mixtures of experts, and layers with states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kernels.gpu.attention import AttentionShape
from kernels.gpu.configs import (
    gated_config,
    gather_config,
    head_squares_config,
    scatter_config,
    sum_parts_config,
)
from kernels.gpu.experts import Layout
from kernels.gpu.latent import head_linear_config, write_latent_config
from kernels.gpu.launch import Compiled, pointer
from kernels.gpu.matmul import MatmulShape
from kernels.gpu.pointwise import add_config, gate_config, softcap_config
from kernels.gpu.recurrence import DeltaShape, gated_norm_config
from kernels.gpu.signatures import (
    BF16,
    F32,
    FORMATS,
    INT8,
    INT32,
    PAGE,
    attention_launches,
    matmul_launch,
    named,
    rope_launch,
)
from kernels.gpu.weights import INT4_GROUP
from kernels.ops import DeltaHeads, Experts, Heads, LatentHeads

# Those of Qwen3-30B-A3B, GLM-4.5-Air and gpt-oss-20b.
QWEN_EXPERTS = Experts(128, 8, normalized=True, first=0, own=128)
GLM_EXPERTS = Experts(128, 8, normalized=True, first=0, own=129, sigmoid=True, shared=1)
GPT_OSS_EXPERTS = Experts(32, 4, normalized=True, first=0, own=32)
# And of Qwen3-Next-80B-A3B, whose shared expert has a gate.
NEXT_EXPERTS = Experts(512, 10, normalized=True, first=0, own=513, shared=1, gated=True)
# Heads of delta nets of Qwen 3.5, with 0.8 and with 9 billion weights.
DELTA_HEADS = (DeltaHeads(16, 16, 128, 128, 4), DeltaHeads(16, 32, 128, 128, 4))

# Channels of LFM2-1.2B's short convolutions.
SHORT_CONV = DeltaHeads(0, 32, 0, 64, 3)

# Of the choice of a row's experts.
DEEPSEEK_EXPERTS = Experts(
    256, 8, normalized=True, first=0, own=257, sigmoid=True, shared=1, groups=8, kept=4
)
ROUTING = {
    **dict.fromkeys(("chosen", "live"), pointer(INT32)),
    **dict.fromkeys(("shares", "scores", "preference", "factors"), pointer(F32)),
}


def expert_launches(*, hopper: bool) -> Iterator[Compiled]:
    """A layer of experts: the order of its rows, and their matmuls, few rows an expert and many."""
    hidden, wide = 2048, 768
    experts = QWEN_EXPERTS
    integers = ("counts", "places", "sources", "experts")
    types = {
        **dict.fromkeys(integers, pointer(INT32)),
        **dict.fromkeys(("out", "x", "y"), pointer(BF16)),
        **dict.fromkeys(("choices", "first", "blocks"), "i32"),
        **ROUTING,
    }
    for rows in (64, 2048):
        layout = Layout(experts, rows)
        for config in (layout.route_config(), layout.count_config(), layout.place_config()):
            label = config.kernel.__name__.removesuffix("_kernel")
            yield named(f"experts {label} {rows}", config, types)
        preferring = Layout(GLM_EXPERTS, rows).route_config(preference=True)
        yield named(f"experts route preferring {rows}", preferring, types)
        for kind, group in FORMATS:
            for name, outputs, inputs in (("up", 2 * wide, hidden), ("down", hidden, wide)):
                shape = MatmulShape(
                    layout.blocks * layout.block_rows,
                    outputs,
                    inputs,
                    kind,
                    group,
                    BF16,
                    bias=False,
                    hopper=hopper,
                    zeros=group == INT4_GROUP,
                    inline=True,
                    expert_rows=layout.block_rows,
                )
                size = f"/{group}" if group > 1 else ""
                yield matmul_launch(shape, f"experts {kind}{size} {name} {rows}")
    yield named("experts gather", gather_config(hidden)[0], types)
    yield named("experts scatter", scatter_config(hidden)[0], types)
    yield named("experts sum", sum_parts_config(hidden, experts.used)[0], types)


def gpt_oss_launches(*, hopper: bool) -> Iterator[Compiled]:
    """What gpt-oss-20b has and no other model: sinks, and experts of MXFP4 with a bias."""
    heads, size = Heads(64, 8, 64), 2880
    for kind, rows in (("decode", 1), ("decode", 64), ("mixed", 64)):
        few = (False, False, rows, rows, kind == "decode", False)
        shape = AttentionShape(heads, PAGE, BF16, *few, hopper, sinks=True)
        yield from attention_launches(shape, f"{kind} sinks {rows}")
    for rows in (1, 64, 2048):
        layout = Layout(GPT_OSS_EXPERTS, rows)
        for name, outputs in (("up", 2 * size), ("down", size)):
            matmul = MatmulShape(
                layout.blocks * layout.block_rows,
                outputs,
                size,
                "float4",
                32,
                BF16,
                bias=True,
                hopper=hopper,
                inline=True,
                expert_rows=layout.block_rows,
            )
            yield matmul_launch(matmul, f"experts float4/32 {name} {rows}")
    types = {"out": pointer(BF16), "x": pointer(BF16)}
    yield Compiled("gated swiglu_oai", gated_config(size, "swiglu_oai")[0], types)


def delta_launches() -> Iterator[Compiled]:
    """Delta nets, and gates of attention."""
    integers = ("positions", "query_starts", "states", "kept_rows", "kept_at")
    floats = ("inputs", "memory", "channels", "gates", "decay", "offset", "taps", "weight")
    types = {
        **dict.fromkeys(integers, pointer(INT32)),
        **dict.fromkeys(floats, pointer(F32)),
        **dict.fromkeys(("out", "x", "gate", "qkv"), pointer(BF16)),
        "sequences": "i32",
        "eps": "fp32",
    }
    for heads in DELTA_HEADS:
        for sequences in (1, 64):
            shape, size = DeltaShape(heads, sequences), f"{heads.value} {sequences}"
            made = types | {"out": pointer(F32)}
            yield named(f"delta channels {size}", shape.channels_config(), made)
        yield named(f"delta {heads.value}", shape.delta_config(), types)
        yield named(f"delta inputs {heads.value}", shape.inputs_config(), types)
    for sequences in (1, 64):
        shape = DeltaShape(SHORT_CONV, sequences)
        yield named(f"short conv {sequences}", shape.short_conv_config(), types)
    yield named("short conv inputs", shape.inputs_config(gated=True), types)
    yield named("gated norm", gated_norm_config(128), types)
    yield named("gate sigmoid", gate_config(4096, 4096, 0, "sigmoid")[0], types)
    yield named("experts route gated", Layout(NEXT_EXPERTS, 64).route_config(), ROUTING)


def latent_launches(*, hopper: bool) -> Iterator[Compiled]:
    """What DeepSeek's models have: latents, and weights of each head's own."""
    for query in (16, 128):
        heads = LatentHeads(query, 512, 128, 64)
        for kind in ("decode", "mixed"):
            for quantized in (False, True):
                few = (quantized, False, 64, 64, kind == "decode", False)
                shape = AttentionShape(heads.cached, PAGE, BF16, *few, hopper)
                size = f"{'int8 ' if quantized else ''}64"
                yield from attention_launches(shape, f"{kind} latents {query} {size}")
    types = {
        **dict.fromkeys(("out", "x", "weight", "absorbed", "q", "kv"), pointer(BF16)),
        **dict.fromkeys(("positions", "slots"), pointer(INT32)),
        **dict.fromkeys(("cosine", "sine", "norm", "scales"), pointer(F32)),
        "rows": "i32",
        "cache": pointer(BF16),
        "eps": "fp32",
    }
    for rows in (16, 64):
        for given, outputs, inputs in ((192, 512, 128), (576, 128, 512)):
            config, _ = head_linear_config(rows, 16, given, outputs, inputs, BF16)
            yield named(f"head_linear {outputs} {rows}", config, types)
    yield named("write_latent", write_latent_config(heads, quantized=False)[0], types)
    groups = Layout(DEEPSEEK_EXPERTS, 64).route_config(preference=True)
    yield named("experts route groups", groups, ROUTING)
    types |= {"cache": pointer(INT8)}
    yield named("write_latent int8", write_latent_config(heads, quantized=True)[0], types)


def gemma_launches(*, hopper: bool) -> Iterator[Compiled]:
    """What Gemma 4 has and no other model: wide heads, normalized values, queries alone, gates of
    per-layer embeddings, and a cap."""
    for heads in (Heads(8, 1, 256), Heads(16, 2, 512)):
        label = f"{heads.query}:{heads.kv} x {heads.dim}"
        for kind in ("decode", "mixed"):
            for quantized in (False, True):
                few = (quantized, heads.dim == 256, 64, 64, kind == "decode", False)
                shape = AttentionShape(heads, PAGE, BF16, *few, hopper)
                size = f"{'int8 ' if quantized else ''}64"
                yield from attention_launches(shape, f"{kind} {label} {size}")
        yield rope_launch(heads, f"values {label}", value_norm=True)
        yield rope_launch(replace(heads, kv=0), f"queries {label}")
    types = {
        **dict.fromkeys(("out", "x", "y", "gate"), pointer(BF16)),
        "cap": "fp32",
    }
    factors = Layout(QWEN_EXPERTS, 64).route_config(factors=True)
    yield named("experts route factors", factors, ROUTING)
    yield named("add", add_config(35 * 256)[0], types)
    yield named("gate gelu_tanh", gate_config(256, 35 * 256, 512, "gelu_tanh")[0], types)
    yield named("softcap", softcap_config(1 << 18)[0], types | {"x": pointer(F32)})


def olmo_launches() -> Iterator[Compiled]:
    """Norms over all heads, of OLMo 3 32B and of one of two ranks with it."""
    whole = Heads(40, 8, 128)
    for heads in (whole, Heads(20, 4, 128)):
        size = f"{heads.query}:{heads.kv}"
        for quantized in (False, True):
            label = f"whole {size}{' int8' if quantized else ''}"
            yield rope_launch(heads, label, quantized=quantized, whole=whole)
        types = {"out": pointer(F32), "qkv": pointer(BF16)}
        yield named(f"head_squares {size}", head_squares_config(heads, keys=True), types)
