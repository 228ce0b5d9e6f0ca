"""Where weights and text meet: the tokenizer that a checkpoint brings."""

from __future__ import annotations

from engine.text.gguf_tokenizer import tokenizer_from_gguf
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf import GGUFCheckpoint


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that belongs to a checkpoint."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return tokenizer_from_gguf(checkpoint.metadata, checkpoint.path.name)
    return load_tokenizer(checkpoint.path, checkpoint.config)
