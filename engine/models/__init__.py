"""Model families by their Hugging Face `model_type`; to add one, write its file and its line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.errors import ConfigError
from engine.models.config import ModelConfig, read_config
from engine.models.llama import Llama
from engine.models.loader import ALONE, WeightLoader
from engine.models.olmo import Olmo
from engine.models.sandwich import Sandwich
from engine.models.shard import Shard
from engine.weights.checkpoint import Checkpoint
from kernels.backend import CacheDType, CacheLayout, WeightStore
from kernels.ops import DeltaHeads, Heads, Ops, T
from kernels.tape import Recorder


class Model(Protocol):
    """Weights in place, and a forward pass that is a function of an `Ops` alone."""

    config: ModelConfig
    heads: tuple[Heads, ...]
    """This rank's of each layer that keeps keys and values."""
    delta: DeltaHeads | None
    """This rank's of layers that keep a state, if there are some."""

    def forward(self, ops: Ops[T]) -> T: ...


MODELS: dict[str, Callable[[ModelConfig, WeightLoader], Model]] = {
    "llama": Llama,
    "mistral": Llama,
    "ministral3": Llama,
    "mixtral": Llama,
    "qwen2": Llama,
    "qwen2_moe": Llama,
    "qwen3": Llama,
    "qwen3_moe": Llama,
    "smollm3": Llama,
    "phi3": Llama,
    "granite": Llama,
    "bitnet": Llama,
    "glm": Llama,
    "ernie4_5": Llama,
    "helium": Llama,
    "ministral": Llama,
    "seed_oss": Llama,
    "gpt_oss": Llama,
    "glm4_moe": Llama,
    "dots1": Llama,
    "ernie4_5_moe": Llama,
    "qwen3_5_text": Llama,
    "qwen3_5_moe_text": Llama,
    "qwen3_next": Llama,
    "lfm2": Llama,
    "lfm2_moe": Llama,
    "deepseek_v2": Llama,
    "deepseek_v3": Llama,
    "glm4_moe_lite": Llama,
    "gemma3_text": Sandwich,
    "glm4": Sandwich,
    "olmo2": Olmo,
    "olmo3": Olmo,
    "gemma4_text": Sandwich,
}


# Those that have another command-line option.
ENCODERS = ("bert",)


def check_family(checkpoint: Checkpoint) -> str:
    """The checkpoint's `model_type`. Raises ConfigError if it is none of MODELS."""
    model_type = checkpoint.config.get("model_type")
    if model_type in ENCODERS:
        raise ConfigError(
            f"model_type is {model_type!r}, an encoder: it makes vectors of texts. Serve it with "
            "--embedding-model, alone with --model none"
        )
    if model_type not in MODELS:
        raise ConfigError(f"model_type is {model_type!r}; these can be served: {', '.join(MODELS)}")
    return str(model_type)


def cache_layout(
    model: Model, page_size: int, dtype: CacheDType, max_context: int = 0
) -> CacheLayout:
    """The cache that a model's forward pass needs."""
    recorder = Recorder()
    windows = recorder.finish(model.forward(recorder)).windows()
    return CacheLayout(
        model.heads,
        page_size,
        dtype,
        max_context,
        model.delta,
        len(model.config.delta_layers),
        frozenset(layer for layer, window in windows.items() if window),
        max(windows.values(), default=0),
    )


def load_model(
    checkpoint: Checkpoint,
    weights: WeightStore,
    progress: Callable[[int, int], None] = lambda *_: None,
    shard: Shard = ALONE,
    *,
    exact: bool = False,
    max_context: int = 0,
) -> Model:
    """Read the checkpoint's configuration, for contexts of up to `max_context` tokens if that is
    not 0, and place its weights, or a rank's `shard` of them; see `WeightLoader` for `exact`.

    Raises ConfigError naming the key or tensor that is wrong.
    """
    model_type = check_family(checkpoint)
    config = read_config(checkpoint.config, checkpoint.rope_factors(), max_context)
    loader = WeightLoader(checkpoint, weights, progress, shard, exact=exact)
    return MODELS[model_type](config, loader)
