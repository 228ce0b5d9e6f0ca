"""Rotary position embedding as Hugging Face configurations describe it: how fast each pair of a
head's values turns in each layer, and how a context beyond that of training is reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.models.gemma4_config import GEMMA4, TURNING
from engine.models.names import DELTA
from kernels.ops import Rope

KINDS = ("linear", "llama3", "yarn", "longrope", "proportional")
# What transformers called LongRoPE at first; and Qwen's for images, whose three positions are the
# same in a text.
ALIKE = {"su": "longrope", "mrope": "default"}
# Families of whose heads half rotates, whether the configuration says so or not.
GLM = ("glm", "glm4")
GLM_SHARE = 0.5
# How much of a head rotates in Qwen's of these days.
QWEN_SHARE = 0.25
# Families whose sliding layers are not scaled, and their bases if their configuration does not say:
# of layers that see everything, and of those that slide if theirs is another.
BASES: dict[str, tuple[float, float | None]] = {"gemma3_text": (1e6, 1e4), "olmo3": (5e5, None)}
# Families that rotate neighbours, instead of values that lie half a head apart.
NEIGHBOURS = (*GLM, "ernie4_5", "ernie4_5_moe", "helium")


@dataclass(frozen=True)
class Positions:
    """The `most` positions that the model knows, of which up to `wanted` will be used."""

    most: int
    wanted: int


def read_ropes(
    raw: dict[str, Any],
    dims: tuple[int, ...],
    windows: tuple[int, ...],
    positions: Positions,
    factors: list[float] | None,
) -> tuple[Rope, ...]:
    """One rotation per layer, whose heads are `dims` wide; `factors` are divisors that the model's
    file has of its own.

    Sliding layers of Gemma and OLMo 3 are never scaled, and Gemma's have a base of their own; some
    of SmolLM3's layers know no positions (NoPE, arXiv 2305.19466).
    """
    parameters = raw.get("rope_parameters") or {}
    dim, width = dims[0], rotated_width(raw, dims[0])
    if raw.get("model_type") == GEMMA4:
        return _gemma4(parameters, dims, windows, positions, factors)
    if (bases := BASES.get(raw.get("model_type", ""))) is not None:
        full = parameters.get("full_attention") or parameters or raw.get("rope_scaling") or {}
        sliding = parameters.get("sliding_attention") or {}
        base = float(full.get("rope_theta") or raw.get("rope_theta") or bases[0])
        near_base = sliding.get("rope_theta") or raw.get("rope_local_base_freq") or bases[1]
        local = base if near_base is None else float(near_base)
        whole = _rope(dim, width, base, full, positions)
        near = _rope(dim, width, local, {}, positions)
        return tuple(near if window else whole for window in windows)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError("rope_parameters differ between kinds of layers, which these do not")
    scaling = dict(parameters or raw.get("rope_scaling") or {})
    # Phi has it beside the others.
    key = "original_max_position_embeddings"
    if raw.get(key) is not None:
        scaling.setdefault(key, raw[key])
    base = float(parameters.get("rope_theta") or raw.get("rope_theta") or 1e4)
    rope = _rope(dim, width, base, scaling, positions, factors)
    unknowing = Rope((0.0,) * (dim // 2))
    return tuple(rope if rotates else unknowing for rotates in _rotating(raw, len(windows)))


def _gemma4(
    parameters: dict[str, Any],
    dims: tuple[int, ...],
    windows: tuple[int, ...],
    positions: Positions,
    factors: list[float] | None,
) -> tuple[Rope, ...]:
    """Layers that see everything turn the fastest pairs alone."""
    kinds = {
        True: {"rope_theta": 1e4, **parameters.get("sliding_attention", {})},
        False: {
            "rope_theta": 1e6,
            "rope_type": "proportional",
            "partial_rotary_factor": TURNING,
            **parameters.get("full_attention", {}),
        },
    }
    made: dict[tuple[bool, int], Rope] = {}
    for dim, window in zip(dims, windows, strict=True):
        kind = kinds[window > 0]
        divisors = None if window else factors
        base = float(kind["rope_theta"])
        if (window > 0, dim) not in made:
            made[window > 0, dim] = _rope(dim, dim, base, kind, positions, divisors)
    return tuple(made[window > 0, dim] for dim, window in zip(dims, windows, strict=True))


def context_reached(raw: dict[str, Any], most: int) -> int:
    """How many positions a model reaches that knows `most`: YaRN multiplies those of training,
    whether the configuration counts them or not."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    scaling = scaling.get("full_attention") or scaling
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return most
    original = scaling.get("original_max_position_embeddings") or most
    return max(most, int(float(original) * float(scaling.get("factor") or 1.0)))


def rotated_width(raw: dict[str, Any], dim: int) -> int:
    """How many of a head's first values are rotated; all, but in some of Phi's models and GLM's."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    share = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share is None and raw.get("model_type") in (*GLM, "glm4_moe"):
        share = GLM_SHARE
    if share is None and raw.get("model_type") in DELTA:
        share = QWEN_SHARE
    width = dim if share is None else int(dim * float(share))
    if not 0 < width <= dim or width % 2:
        raise ConfigError(f"partial_rotary_factor is {share}, of heads of {dim}")
    return width


def _rotating(raw: dict[str, Any], layers: int) -> list[bool]:
    if raw.get("model_type") != "smollm3":
        return [True] * layers
    listed = raw.get("no_rope_layers")  # what is listed are those that do rotate
    if listed is None:
        step = int(raw.get("no_rope_layer_interval") or 4)
        return [(layer + 1) % step != 0 for layer in range(layers)]
    if len(listed) != layers:
        raise ConfigError(f"no_rope_layers has {len(listed)} entries for {layers} layers")
    return [bool(rotates) for rotates in listed]


def _rope(
    dim: int,
    width: int,
    base: float,
    scaling: dict[str, Any],
    positions: Positions,
    factors: list[float] | None = None,
) -> Rope:
    """Scaled as the configuration or the file says, padded with 0 for pairs that do not turn."""
    plain = [base ** (-2 * i / width) for i in range(width // 2)]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = ALIKE.get(kind, kind)
    magnitude = 1.0
    try:
        if factors is not None:
            frequencies = _divided(plain, factors, "tensor 'rope_freqs.weight'")
        elif kind == "linear":
            frequencies = [f / float(scaling["factor"]) for f in plain]
        elif kind == "llama3":
            frequencies = [_llama3(f, scaling) for f in plain]
        elif kind == "yarn":
            frequencies, magnitude = _yarn(plain, base, scaling, positions)
        elif kind == "longrope":
            frequencies, magnitude = _longrope(plain, scaling, positions)
        elif kind == "proportional":
            share = float(scaling.get("partial_rotary_factor", 1.0))
            if not 0 < share <= 1:
                raise ConfigError(f"partial_rotary_factor is {share}, of heads of {dim}")
            turning = int(share * dim // 2)
            factor = float(scaling.get("factor") or 1.0)
            frequencies = [f / factor if i < turning else 0.0 for i, f in enumerate(plain)]
        elif kind in ("default", "none"):
            frequencies = plain
        else:
            known = ", ".join(KINDS)
            raise ConfigError(f"rope_scaling is of type {kind!r}; these work: {known}")
    except KeyError as error:
        raise ConfigError(f"rope_scaling of type {kind!r} lacks {error.args[0]!r}") from None
    still = [0.0] * ((dim - width) // 2)
    growth = float(scaling.get("llama_4_scaling_beta") or 0.0)
    step = int(scaling.get("original_max_position_embeddings") or 0) if growth else 1
    if step < 1:
        raise ConfigError("llama_4_scaling_beta is set without original_max_position_embeddings")
    return Rope((*frequencies, *still), magnitude, growth, step)


def _divided(frequencies: list[float], divisors: Sequence[float], what: str) -> list[float]:
    if len(divisors) != len(frequencies):
        raise ConfigError(f"{what} has {len(divisors)} entries, not {len(frequencies)}")
    return [f / float(d) for f, d in zip(frequencies, divisors, strict=True)]


def _llama3(frequency: float, scaling: dict[str, Any]) -> float:
    """Llama 3.1's rule: long wavelengths are divided by the factor, short kept, a ramp between."""
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(
    plain: list[float], base: float, scaling: dict[str, Any], positions: Positions
) -> tuple[list[float], float]:
    """YaRN (arXiv 2309.00071): pairs that turn less than `beta_slow` times within the context of
    training are slowed by the factor, those that turn more than `beta_fast` times are not, and
    queries and keys grow with the factor's logarithm."""
    original = float(scaling.get("original_max_position_embeddings") or positions.most)
    factor = float(scaling.get("factor") or positions.most / original)
    width = 2 * len(plain)

    def pair(turns: float) -> float:
        """The number of the pair that turns so often."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = pair(float(scaling.get("beta_fast") or 32))
    last = pair(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = max(last - first, 1e-3)
    kept = [1 - min(max((i - first) / ramp, 0.0), 1.0) for i in range(len(plain))]
    frequencies = [f * k + f / factor * (1 - k) for f, k in zip(plain, kept, strict=True)]

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = growth(above) / growth(below) if above and below else growth(1.0)
    return frequencies, float(magnitude)


def _longrope(
    plain: list[float], scaling: dict[str, Any], positions: Positions
) -> tuple[list[float], float]:
    """LongRoPE (arXiv 2402.13753): divisors found by search, others for contexts that go beyond
    that of training. Keys stay in the cache, so what is wanted decides for all of them."""
    original = float(scaling["original_max_position_embeddings"])
    key = "long_factor" if positions.wanted > original else "short_factor"
    frequencies = _divided(plain, scaling[key], key)
    factor = float(scaling.get("factor") or positions.most / original)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        growth = 1 + math.log(factor) / math.log(original) if factor > 1 else 1.0
        magnitude = math.sqrt(growth)
    return frequencies, float(magnitude)
