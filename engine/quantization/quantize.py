"""A folder in Hugging Face layout as another in 4 bits, which every backend reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as to_blocks
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.execution.tokenizer import open_tokenizer
from engine.models import check_family
from engine.quantization.calibration import Calibration
from engine.quantization.fit import GROUP, gptq, plain
from engine.weights import blocks
from engine.weights.checkpoint import open_checkpoint
from engine.weights.safetensors import SafetensorsCheckpoint

Progress = Callable[[str, int, int], None]
# What a model's text is made with; its code is never copied.
COPIED = ("*.json", "*.jinja", "tokenizer.model")
SHARD_BYTES = 4 << 30
# Products of inputs that are held at a time; a model whose linears need more is run through again.
PRODUCT_BYTES = 4 << 30
# Tokens of a text that go through the model together.
WINDOW = 512
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight")


def quantize(
    source: Path, target: Path, windows: Sequence[Sequence[int]], progress: Progress
) -> None:
    """Write the model of folder `source` to the new folder `target`: linears as Q4_1, table and
    head as Q8_0, all else as it is. With `windows`, token ids of a text, linears are fitted to what
    they are given there, but for experts. Raises ConfigError if the source is no float model, or
    the target is there."""
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise ConfigError(
            f"{source} is a GGUF file, which has its bits; give the float model's folder"
        )
    if "quantization_config" in checkpoint.config:
        raise ConfigError(f"{source} is quantized already; give the float model")
    check_family(checkpoint)
    if target.exists():
        raise ConfigError(f"{target} is there already; name a folder that is not")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _copy_texts(source, checkpoint, partial)
        _write(_tensors(checkpoint, windows, progress), partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_texts(source: Path, checkpoint: SafetensorsCheckpoint, partial: Path) -> None:
    """The configuration, which says what has become of the weights, and the tokenizer."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name != "model.safetensors.index.json":
                shutil.copy(file, partial / file.name)
    config = checkpoint.config | {"quantization_config": {"quant_method": blocks.METHOD}}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _tensors(
    checkpoint: SafetensorsCheckpoint, windows: Sequence[Sequence[int]], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors as they are stored, the calibrated linears first."""
    left = checkpoint.names()
    total = len(left)
    fitted = _calibrated(checkpoint, windows, progress) if windows else iter(())
    for name, products in fitted:
        left.discard(name)
        yield f"{name}.q4_1", gptq(checkpoint.tensor(name).dense().float(), products).blocks()
        progress("quantize", total - len(left), total)
    for name in sorted(left):
        left.discard(name)
        tensor = checkpoint.tensor(name).dense()
        matrix = tensor.dim() == 2 and tensor.shape[1] % GROUP == 0
        if not matrix or name.endswith(ROUTERS):
            yield name, tensor
        elif name in VOCABULARY:
            rows = to_blocks(tensor.float().numpy(), GGMLQuantizationType.Q8_0)
            yield f"{name}.q8_0", torch.from_numpy(rows)
        else:
            yield f"{name}.q4_1", plain(tensor.float()).blocks()
        progress("quantize", total - len(left), total)


def _calibrated(
    checkpoint: SafetensorsCheckpoint, windows: Sequence[Sequence[int]], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices of linears, and the products of their inputs."""
    done = 0

    def seen() -> None:
        nonlocal done
        done += 1
        progress("calibrate", done, len(windows) * passes)

    passes = 1
    calibration = Calibration(checkpoint, windows, seen)
    # A linear's name is those of the matrices that are stacked in it.
    linears = {
        name: inputs
        for name, inputs in calibration.linears.items()
        if inputs % GROUP == 0
        and not any(part in VOCABULARY or part.endswith(ROUTERS) for part in name.split("+"))
    }
    rounds = list(_rounds(linears))
    passes = len(rounds)
    for names in rounds:
        for name, products in calibration.products(names).items():
            for part in name.split("+"):
                yield part, products


def _rounds(linears: dict[str, int]) -> Iterator[list[str]]:
    """Linears whose products are held at the same time."""
    names: list[str] = []
    size = 0
    for name, inputs in linears.items():
        if names and size + 4 * inputs**2 > PRODUCT_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * inputs**2
    yield names


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
    ids = tokenizer.encode(text)[len(first) :]
    if not ids:
        raise ConfigError("the text to calibrate with is empty")
    starts = range(0, max(1, len(ids) - WINDOW + 1), WINDOW)
    wanted = min(len(starts), max(1, most // WINDOW))
    chosen = np.linspace(0, len(starts) - 1, wanted).astype(int)
    return [[*first, *ids[starts[n] : starts[n] + WINDOW]] for n in chosen]
