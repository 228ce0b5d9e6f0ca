"""A model's shape, read from Hugging Face configuration keys and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.models.experts_config import ExpertsConfig, expert_layers, read_experts
from engine.models.gemma4_config import (
    GEMMA4,
    LayerInputs,
    Layers,
    read_inputs,
    read_layers,
    sliding,
)
from engine.models.latent_config import (
    LATENT,
    LatentConfig,
    latent_scale,
    read_latent,
)
from engine.models.names import CONV, DELTA, GPT_OSS, LFM2
from engine.models.rope import (
    NEIGHBOURS,
    Positions,
    context_reached,
    read_ropes,
    rotated_width,
)
from engine.models.values import Values
from kernels.ops import SWIGLU_LIMIT, SWIGLU_SLOPE, Activation, DeltaHeads, Heads, Rope

# No model comes near these; a damaged file that does would take all memory before it is noticed.
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 24
MAX_TAPS = 16
LINEAR, CONVOLVING, SLIDING = "linear_attention", "conv", "sliding_attention"
# Channels of short convolutions that stay together.
CHANNELS = 16
NORM_EPSILONS = ("rms_norm_eps", "norm_eps")
# Set for files that have value heads in ggml's order.
TILED = "linear_tiled_value_heads"

GEMMA = ("gemma3_text", GEMMA4)
# Families whose output matrix is the embedding's if their configuration does not say.
TIED = ("gemma3_text", GEMMA4, "smollm3", "ernie4_5", "ernie4_5_moe", *CONV)
# Those that normalize all queries, and all keys, of a token together; and each query and key head.
WHOLE_NORMS = ("olmo2", "olmo3")
HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", GEMMA4, "dots1", *DELTA, *CONV, *WHOLE_NORMS)
# Of how many layers the last sees everything, if their configuration does not say.
PATTERNS = {"gemma3_text": 6, "olmo3": 4}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a model's code needs to know; per-layer values are tuples over layers."""

    model_type: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: Heads
    each: Layers
    """What differs between layers, in some families."""
    norm_eps: float
    max_context: int
    activation: Activation
    windows: tuple[int, ...]
    """Sliding window of each layer; 0 sees everything."""
    ropes: tuple[Rope, ...]
    rotated: tuple[int, ...]
    """How many of a head's first values are rotated, in each layer."""
    neighbours: bool
    """Whether pairs that rotate together are neighbours, instead of half of `rotated` apart."""
    attention_scale: float
    embedding_scale: float
    logits_scale: float
    tied_embeddings: bool
    head_norms: bool
    whole_norms: bool
    """Whether those of queries and keys go over all heads at once."""
    inner_norms: bool
    """Whether attention and feed-forward outputs are normalized before their last projection."""
    sinks: bool
    """Whether each head has a score that takes its share of attention without giving a value."""
    experts: ExpertsConfig | None = None
    expert_layers: frozenset[int] = frozenset()
    """Layers whose feed-forward part is experts."""
    delta: DeltaHeads | None = None
    delta_layers: tuple[int, ...] = ()
    """Layers that keep a state instead of keys and values."""
    gated_attention: bool = False
    """Whether what attention gives is multiplied by a sigmoid, which queries' projection has."""
    value_norms: bool = False
    """Whether values are normalized, too, without a weight."""
    inputs: LayerInputs | None = None
    latent: LatentConfig | None = None
    """The widths of latent attention, where the cache holds latents instead of keys and values."""
    logits_cap: float = 0.0
    """What logits stay below; 0 if there is no such bound."""

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """Layers that keep keys and values."""
        delta = set(self.delta_layers)
        return tuple(n for n in range(self.layers) if n not in delta and self.each.keys_of[n] == n)


def read_config(
    raw: dict[str, Any], rope_factors: list[float] | None, max_context: int = 0
) -> ModelConfig:
    """Read a model's configuration, for contexts of up to `max_context` tokens if that is not 0.
    Raises ConfigError naming the key that is missing or wrong."""
    try:
        return _read(raw, rope_factors, max_context)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"the model's configuration is malformed: {error}") from error


def _read(raw: dict[str, Any], rope_factors: list[float] | None, max_context: int) -> ModelConfig:
    values = Values(raw)
    model_type = values.text("model_type")
    hidden = values.integer("hidden_size")
    layers = values.integer("num_hidden_layers", most=MAX_LAYERS)
    recurrent, convolving = model_type in DELTA, model_type in CONV
    latent = read_latent(values) if model_type in LATENT else None
    heads = latent.heads.cached if latent else _heads(values, hidden, model_type)
    gemma4 = model_type == GEMMA4
    windows = sliding(values, layers) if gemma4 else _windows(values, layers, model_type)
    experts = read_experts(values, model_type)
    intermediate = _intermediate(values, model_type, experts)
    each = Layers((heads,) * layers, (intermediate,) * layers, tuple(range(layers)))
    if gemma4:
        each = read_layers(values, heads, intermediate, windows)
    dims = tuple(latent.heads.turned if latent else own.dim for own in each.heads)
    known = values.integer("max_position_embeddings", most=MAX_POSITIONS)
    reached = context_reached(raw, known)
    positions = Positions(known, min(max_context or reached, reached))
    scale = 1.0 if gemma4 else float(raw.get("query_pre_attn_scalar") or heads.dim) ** -0.5
    scale = latent_scale(raw, latent.heads) if latent else scale
    # Granite multiplies what each block adds. Instead everything else is divided by it, which
    # norms do not notice, but for their epsilon.
    share = values.number("residual_multiplier", 1.0)
    ropes = read_ropes(raw, dims, windows, positions, rope_factors)
    if latent and any(rope.growth for rope in ropes):
        raise ConfigError(
            "llama_4_scaling_beta is set, which latent attention is not computed with"
        )
    return ModelConfig(
        model_type=model_type,
        vocab_size=values.integer("vocab_size"),
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        each=each,
        norm_eps=values.number(values.known(NORM_EPSILONS), 1e-6) / share**2,
        max_context=reached,
        activation=_activation(values, model_type),
        windows=windows,
        ropes=ropes,
        rotated=tuple(rotated_width(raw, dim) for dim in dims),
        neighbours=bool(raw.get("rope_interleave", model_type in (*NEIGHBOURS, *LATENT))),
        attention_scale=values.number("attention_multiplier", scale),
        embedding_scale=(
            math.sqrt(hidden)
            if model_type in GEMMA
            else values.number("embedding_multiplier", 1.0) / share
        ),
        logits_scale=1.0 / values.number("logits_scaling", 1.0),
        # What these say only if it is otherwise.
        tied_embeddings=bool(raw.get("tie_word_embeddings", model_type in TIED)),
        head_norms=model_type in HEAD_NORMS or bool(raw.get("use_qk_norm", False)),
        whole_norms=model_type in WHOLE_NORMS,
        inner_norms=model_type == "bitnet",
        sinks=model_type == GPT_OSS,
        experts=experts,
        expert_layers=expert_layers(values, layers) if experts is not None else frozenset(),
        delta=_delta(values) if recurrent else _conv(values, hidden) if convolving else None,
        delta_layers=_delta_layers(values, layers) if recurrent or convolving else (),
        gated_attention=recurrent,
        value_norms=gemma4,
        inputs=read_inputs(values) if gemma4 else None,
        latent=latent,
        logits_cap=_cap(values, model_type),
    )


def _heads(values: Values, hidden: int, model_type: str) -> Heads:
    """Those of all layers, where they are alike."""
    query = values.integer("num_attention_heads")
    kv = values.integer("num_key_value_heads", query)
    if query % kv:
        raise ConfigError(f"num_attention_heads {query} is no multiple of key/value heads {kv}")
    unsaid = 256 if model_type in DELTA else hidden // query
    heads = Heads(query, kv, values.integer("head_dim", unsaid))
    if heads.dim % 2:
        raise ConfigError(f"head_dim is {heads.dim}; rotary embedding needs an even one")
    return heads


def _intermediate(values: Values, model_type: str, experts: ExpertsConfig | None) -> int:
    """The width of dense feed-forward layers; LFM2's may be said as another, to be adjusted."""
    raw = values.raw
    if model_type != LFM2:
        unsaid = experts.width if model_type in DELTA and experts else None
        return values.integer("intermediate_size", unsaid)
    width = values.integer(values.known(("block_ff_dim", "intermediate_size")))
    if not raw.get("block_auto_adjust_ff_dim", True):
        return width
    unit = values.integer("block_multiple_of", 256)
    width = int(values.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
    return -(-width // unit) * unit


def _conv(values: Values, hidden: int) -> DeltaHeads:
    if hidden % CHANNELS:
        raise ConfigError(f"hidden_size is {hidden}; convolutions take multiples of {CHANNELS}")
    taps = values.integer("conv_L_cache", 3, most=MAX_TAPS)
    if taps < 2:
        raise ConfigError("conv_L_cache is 1; 2 or more can be computed")
    return DeltaHeads(0, hidden // CHANNELS, 0, CHANNELS, taps)


def _delta(values: Values) -> DeltaHeads:
    """Qwen's files leave out what is the same in most sizes."""
    heads = DeltaHeads(
        values.integer("linear_num_key_heads", 16),
        values.integer("linear_num_value_heads", 32),
        values.integer("linear_key_head_dim", 128),
        values.integer("linear_value_head_dim", 128),
        values.integer("linear_conv_kernel_dim", 4, most=MAX_TAPS),
        tiled=bool(values.raw.get(TILED)),
    )
    if heads.value % heads.key:
        raise ConfigError(
            f"linear_num_value_heads {heads.value} is no multiple of key heads {heads.key}"
        )
    if heads.taps < 2:
        raise ConfigError("linear_conv_kernel_dim is 1; 2 or more can be computed")
    return heads


def _delta_layers(values: Values, layers: int) -> tuple[int, ...]:
    """All but every fourth, if the configuration does not say; the last is attention."""
    types = values.raw.get("layer_types")
    if types is None and (attending := values.raw.get("full_attn_idxs")) is not None:
        types = ["full_attention" if n in attending else CONVOLVING for n in range(layers)]
    if types is None:
        step = values.integer("full_attention_interval", 4)
        types = ["full_attention" if (n + 1) % step == 0 else LINEAR for n in range(layers)]
    found = tuple(n for n, kind in enumerate(types) if kind in (LINEAR, CONVOLVING))
    if len(found) == layers:
        raise ConfigError("no layer is of type full_attention, which some have to be")
    return found


def _activation(values: Values, model_type: str) -> Activation:
    default = "gelu_pytorch_tanh" if model_type in GEMMA else "silu"
    raw = values.raw
    if model_type == GPT_OSS:
        for key, known in (("swiglu_limit", SWIGLU_LIMIT), ("swiglu_alpha", SWIGLU_SLOPE)):
            if values.number(key, known) != known:
                raise ConfigError(f"{key} is {raw[key]!r}; {known} can be computed")
        return "swiglu_oai"
    name = raw.get("hidden_activation") or raw.get("hidden_act") or default
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act is {name!r}; {', '.join(ACTIVATIONS)} can be computed")
    return ACTIVATIONS[name]


def _cap(values: Values, model_type: str) -> float:
    """What logits stay below; those of attention cannot be bounded."""
    key = "final_logit_softcapping"
    refused = ("attn_logit_softcapping", *((key,) if model_type != GEMMA4 else ()))
    for name in refused:
        if values.raw.get(name):
            raise ConfigError(f"{name} is set, which this model is not computed with")
    return values.number(key, 1.0) if values.raw.get(key) else 0.0


def _windows(values: Values, layers: int, model_type: str) -> tuple[int, ...]:
    """Which layers slide: all of Mistral's, Qwen's upper ones if switched on, 5 of Gemma's 6, 3 of
    OLMo 3's 4, every other one of gpt-oss."""
    raw = values.raw
    window = values.integer("sliding_window", 0) if raw.get("sliding_window") else 0
    if model_type in (GPT_OSS, "olmo3"):
        window = values.integer("sliding_window")
    if types := raw.get("layer_types"):
        if len(types) != layers:
            raise ConfigError(f"layer_types has {len(types)} entries for {layers} layers")
        if unknown := set(types) - {"full_attention", SLIDING, LINEAR, CONVOLVING}:
            raise ConfigError(f"layer_types has {min(map(str, unknown))!r}, which is unknown")
        if SLIDING in types and not window:
            raise ConfigError(f"layer_types has {SLIDING!r}, but there is no sliding_window")
        return tuple(window if t == SLIDING else 0 for t in types)
    if model_type in PATTERNS:
        pattern = values.integer("sliding_window_pattern", PATTERNS[model_type])
        return tuple(0 if (layer + 1) % pattern == 0 else window for layer in range(layers))
    if model_type == GPT_OSS:
        return tuple(0 if layer % 2 else window for layer in range(layers))
    if model_type == "dots1":
        first = values.integer("max_window_layers", 62)
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if model_type in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"):
        first = (
            values.integer("max_window_layers", layers) if raw.get("use_sliding_window") else layers
        )
        return tuple(window if layer >= first else 0 for layer in range(layers))
    return (window,) * layers
