"""How a model's makers recommend to draw its tokens, for what requests leave out."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import ConfigError, InvalidRequest
from engine.text.tokenizer import GENERATION, optional_json
from engine.types import SamplingParams
from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf import GGUFCheckpoint
from engine.weights.sources import KNOWN_MODELS

# Fields of `SamplingParams`, and what they are called in a GGUF's metadata.
FIELDS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def recommended_sampling(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Fields of `SamplingParams` that come with a checkpoint (a folder's `generation_config.json`,
    a GGUF's `general.sampling`), or are known for the model called `name`; none if nobody says
    anything.

    Raises ConfigError if no request could be served with them.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        source, said = checkpoint.path.name, checkpoint.metadata
        found = {field: said[key] for field, key in FIELDS.items() if key in said}
    else:
        source, said = GENERATION, optional_json(checkpoint.path / GENERATION)
        found = {field: said[field] for field in FIELDS if said.get(field) is not None}
    if not found and name in KNOWN_MODELS:
        found = dict(KNOWN_MODELS[name].sampling)
    try:
        msgspec.convert(found, SamplingParams).validate(1)
    except (InvalidRequest, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{source} recommends what no token can be drawn with: {error}; mend it there, or set "
            "model.recommended_sampling = false"
        ) from error
    return found
