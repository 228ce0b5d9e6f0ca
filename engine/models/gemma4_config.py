"""What differs between the layers of Gemma 4, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.errors import ConfigError
from engine.models.values import Values
from kernels.ops import Heads

GEMMA4 = "gemma4_text"
# What the configuration leaves out where it is this.
WINDOW, WIDE_HEADS, PER_LAYER, VOCABULARY = 512, 512, 256, 262144
# One of so many sees everything, and turns this share of its pairs.
PATTERN, TURNING = 6, 0.25


@dataclass(frozen=True)
class LayerInputs:
    """A vector of `width` values for each token and layer, from a table of `rows` tokens."""

    width: int
    rows: int


@dataclass(frozen=True)
class Layers:
    """Each layer's heads, width of its feed-forward part, and the layer whose keys and values it
    reads; of layers in `doubling` keys are the values, too, before they are normalized."""

    heads: tuple[Heads, ...]
    intermediate: tuple[int, ...]
    keys_of: tuple[int, ...]
    doubling: frozenset[int] = frozenset()


def sliding(values: Values, layers: int) -> tuple[int, ...]:
    """Each layer's window; 0 of the last and of every sixth, if the configuration does not say."""
    window = values.integer("sliding_window", WINDOW)
    types = values.raw.get("layer_types")
    if types is None:
        kinds = ("full_attention", "sliding_attention")
        types = [kinds[(n + 1) % PATTERN > 0] for n in range(layers)]
    if len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries for {layers} layers")
    unknown = [kind for kind in types if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        raise ConfigError(f"layer_types has {unknown[0]!r}, which no layer of Gemma 4 is")
    # The last one sees everything, whatever is said.
    return tuple(window if kind == "sliding_attention" else 0 for kind in [*types[:-1], "full"])


def read_layers(
    values: Values, heads: Heads, intermediate: int, windows: tuple[int, ...]
) -> Layers:
    """Layers that see everything have wider heads, and fewer of keys and values; the last ones read
    keys and values of the last layer of their kind that makes some."""
    raw, count = values.raw, len(windows)
    if raw.get("use_bidirectional_attention") == "all":
        raise ConfigError("use_bidirectional_attention is 'all'; answers are written left to right")
    own = raw.get("per_layer_config")
    wide = replace(heads, dim=values.integer("global_head_dim", WIDE_HEADS))
    same = bool(raw.get("attention_k_eq_v", False))
    if same:
        wide = replace(wide, kv=values.integer("num_global_key_value_heads", heads.kv))
    found = []
    for layer, window in enumerate(windows):
        given = wide if window == 0 else heads
        if own is not None:
            said = Values(own.get(str(layer), {}))
            given = replace(
                heads,
                kv=said.integer("num_key_value_heads", heads.kv),
                dim=said.integer("head_dim", heads.dim),
            )
        if given.query % given.kv or given.dim % 2:
            raise ConfigError(f"layer {layer} has {given}, which cannot be computed")
        found.append(given)
    shared = values.integer("num_kv_shared_layers", most=count - 1) if _some(raw) else 0
    first = count - shared
    keys_of = list(range(count))
    for layer in range(first, count):
        alike = [n for n in range(first) if (windows[n] == 0) == (windows[layer] == 0)]
        if not alike or found[alike[-1]] != found[layer]:
            raise ConfigError(f"num_kv_shared_layers leaves no keys for layer {layer} to read")
        keys_of[layer] = alike[-1]
    double = bool(raw.get("use_double_wide_mlp", False))
    widths = [intermediate * (2 if double and n >= first else 1) for n in range(count)]
    doubling = frozenset(n for n in range(count) if same and windows[n] == 0)
    return Layers(tuple(found), tuple(widths), tuple(keys_of), doubling)


def _some(raw: dict[str, Any]) -> bool:
    """Whether layers share keys and values."""
    return raw.get("num_kv_shared_layers") not in (None, 0)


def read_inputs(values: Values) -> LayerInputs | None:
    """Vectors of the layers; larger models have none."""
    key = "hidden_size_per_layer_input"
    if values.raw.get(key, PER_LAYER) in (0, None):
        return None
    rows = values.integer("vocab_size_per_layer_input", VOCABULARY)
    return LayerInputs(values.integer(key, PER_LAYER), rows)
