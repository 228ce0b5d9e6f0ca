"""Models in Hugging Face layout, read as floats and written anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.execution.tokenizer import open_tokenizer
from engine.models import check_family
from engine.models.config import read_config
from engine.weights.checkpoint import open_checkpoint
from engine.weights.safetensors import SafetensorsCheckpoint

Progress = Callable[[str, int, int], None]
# What a model's text is made with; its code is never copied.
COPIED = ("*.json", "*.jinja", "tokenizer.model")
SHARD_BYTES = 4 << 30
# Tokens of a text that go through the model together.
WINDOW = 512
LEAST_TOKENS = 16384


def open_floats(source: Path) -> SafetensorsCheckpoint:
    """A float model of a known family. Raises ConfigError if it is something else."""
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise ConfigError(f"{source} is a GGUF file, which has its bits; give the float folder")
    if checkpoint.config.get("quantization_config"):
        raise ConfigError(f"{source} is quantized already; give the float model")
    check_family(checkpoint)
    read_config(checkpoint.config, checkpoint.rope_factors())
    return checkpoint


def finite(checkpoint: SafetensorsCheckpoint, name: str) -> torch.Tensor:
    """A tensor as it is stored. Raises ConfigError if it holds what is no number."""
    tensor = checkpoint.tensor(name).dense()
    if not tensor.isfinite().all():
        raise ConfigError(f"tensor {name!r} holds values that are not finite")
    return tensor


def check_free(target: Path) -> None:
    """Raises ConfigError if something is there already."""
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already; name a folder that is not")


def write_model(
    checkpoint: SafetensorsCheckpoint,
    target: Path,
    changes: dict[str, Any],
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """A new folder with the checkpoint's tokenizer, its configuration with `changes`, and these
    tensors; all of it or nothing. Raises ConfigError if it is there."""
    check_free(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for pattern in COPIED:
            for file in checkpoint.path.glob(pattern):
                if file.name != "model.safetensors.index.json":
                    shutil.copyfile(file, partial / file.name)
        config = json.dumps(checkpoint.config | changes, indent=2)
        (partial / "config.json").write_text(config + "\n")
        _write(tensors, partial)
        partial.rename(target)
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"cannot write {target}: {error}") from error
    finally:
        # Nothing is left of it once it has its name.
        shutil.rmtree(partial, ignore_errors=True)


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
        file.chmod((folder / "config.json").stat().st_mode)  # as the other files are


def windows_of(
    checkpoint: SafetensorsCheckpoint, text: str, most: int | None = None
) -> list[list[int]]:
    """Up to `most` tokens of a text as the model's tokenizer cuts it, in windows that are spread
    over all of it, each behind what every prompt begins with; by default four for each input of the
    widest linear. Raises ConfigError if there are no tokens."""
    if most is None:
        config = read_config(checkpoint.config, checkpoint.rope_factors())
        most = max(LEAST_TOKENS, 4 * max(*config.each.intermediate, config.hidden))
    tokenizer = open_tokenizer(checkpoint)
    ids, empty = tokenizer.encode(text), tokenizer.encode("")
    first: list[int] = []
    for token, other in zip(ids, empty, strict=False):
        if token != other:
            break
        first.append(token)
    ids = ids[len(first) : len(ids) - (len(empty) - len(first))]
    if not ids:
        raise ConfigError("the text to calibrate with is empty")
    size = min(WINDOW, most)
    starts = list(range(0, len(ids), size))
    wanted = min(len(starts), most // size)
    if wanted < len(starts) and len(ids) % size:
        starts.pop()  # the last one is short, and others are not
    chosen = np.linspace(0, len(starts) - 1, wanted).astype(int)
    return [[*first, *ids[starts[n] : starts[n] + size]] for n in chosen]
