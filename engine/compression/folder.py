"""Models in Hugging Face layout, read as floats and written anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.execution.tokenizer import open_tokenizer
from engine.models import check_family
from engine.weights.checkpoint import open_checkpoint
from engine.weights.safetensors import SafetensorsCheckpoint

Progress = Callable[[str, int, int], None]
# What a model's text is made with; its code is never copied.
COPIED = ("*.json", "*.jinja", "tokenizer.model")
SHARD_BYTES = 4 << 30
# Tokens of a text that go through the model together.
WINDOW = 512


def open_floats(source: Path) -> SafetensorsCheckpoint:
    """A float model of a known family. Raises ConfigError if it is something else."""
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise ConfigError(f"{source} is a GGUF file, which has its bits; give the float folder")
    if "quantization_config" in checkpoint.config:
        raise ConfigError(f"{source} is quantized already; give the float model")
    check_family(checkpoint)
    return checkpoint


def write_model(
    checkpoint: SafetensorsCheckpoint,
    target: Path,
    changes: dict[str, Any],
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """A new folder with the checkpoint's tokenizer, its configuration with `changes`, and these
    tensors; all of it or nothing. Raises ConfigError if it is there."""
    if target.exists():
        raise ConfigError(f"{target} is there already; name a folder that is not")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for pattern in COPIED:
            for file in checkpoint.path.glob(pattern):
                if file.name != "model.safetensors.index.json":
                    shutil.copy(file, partial / file.name)
        config = json.dumps(checkpoint.config | changes, indent=2)
        (partial / "config.json").write_text(config + "\n")
        _write(tensors, partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """As many files as it takes; the loader reads all that are there."""
    shard: dict[str, torch.Tensor] = {}
    count, size = 0, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_file(shard, folder / f"model-{count:05}.safetensors")
            shard, size, count = {}, 0, count + 1
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    save_file(shard, folder / f"model-{count:05}.safetensors")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # as the other files are


def windows_of(source: Path, text: str, most: int) -> list[list[int]]:
    """Up to `most` tokens of a text as the model's tokenizer cuts it, in windows that are spread
    over all of it, each behind what every prompt begins with. Raises ConfigError if there are no
    tokens."""
    tokenizer = open_tokenizer(open_checkpoint(source))
    first = tokenizer.encode("")
    ids: Sequence[int] = tokenizer.encode(text)[len(first) :]
    if not ids:
        raise ConfigError("the text to calibrate with is empty")
    starts = range(0, max(1, len(ids) - WINDOW + 1), WINDOW)
    wanted = min(len(starts), max(1, most // WINDOW))
    chosen = np.linspace(0, len(starts) - 1, wanted).astype(int)
    return [[*first, *ids[starts[n] : starts[n] + WINDOW]] for n in chosen]
