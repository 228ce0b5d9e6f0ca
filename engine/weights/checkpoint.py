"""What a model file gives: its configuration in Hugging Face terms, and its tensors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from engine.errors import ConfigError
from kernels.backend import HostTensor

# No model comes near it; a damaged file that does would take all memory before it is noticed.
MAX_EXPERTS = 4096


class Checkpoint(Protocol):
    """A model on disk. Tensor names and configuration keys are Hugging Face's."""

    path: Path
    config: dict[str, Any]
    norms_include_one: bool
    """Whether norm weights of the Gemma kind are stored with their 1 already added."""

    def names(self) -> set[str]:
        """All tensor names."""
        ...

    def tensor(self, name: str) -> HostTensor:
        """One tensor, not yet read. Raises ConfigError if it is missing or unreadable."""
        ...

    def rope_factors(self) -> list[float] | None:
        """Per-frequency divisors that the file carries instead of scaling parameters, if any."""
        ...


def open_checkpoint(path: Path, *, texts: bool = True) -> Checkpoint:
    """Open a `.gguf` file or a folder in Hugging Face layout. Without `texts` it is enough for the
    weights, but not for the tokenizer.

    Raises ConfigError in one sentence if it is neither, or corrupt.
    """
    from engine.weights.gguf import GGUFCheckpoint
    from engine.weights.safetensors import SafetensorsCheckpoint

    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix.lower() == ".gguf":
        return GGUFCheckpoint(path, texts=texts)
    raise ConfigError(
        f"{path} is neither a .gguf file nor a folder with config.json and *.safetensors"
    )
