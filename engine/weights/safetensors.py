"""Checkpoints in Hugging Face layout: `config.json` and one or many `*.safetensors` files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ConfigError
from engine.weights import bitnet, blocks, stacked
from engine.weights.composite import text_config, text_name
from engine.weights.fused import FusedTensors
from engine.weights.quantized import Quantized
from engine.weights.renamed import usual_name
from engine.weights.stacked import StackedExperts
from kernels.backend import HostTensor

INDEX = "model.safetensors.index.json"
FORMATS = ("F32", "F16", "BF16")
SCALE = "_scale"  # after a ternary tensor's name


@dataclass(frozen=True, eq=False)
class SafeTensor:
    """A tensor in a memory-mapped file, `stored` its slice there, or the part of it within `spans`
    (first, behind the last) of each dimension."""

    name: str
    format: str
    stored: Any
    spans: tuple[tuple[int, int], ...]

    block = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(last - first for first, last in self.spans)

    def narrow(self, dimension: int, start: int, length: int) -> SafeTensor:
        spans = list(self.spans)
        first = spans[dimension][0] + start
        spans[dimension] = (first, first + length)
        return replace(self, spans=tuple(spans))

    def dense(self) -> torch.Tensor:
        tensor: torch.Tensor = self.stored[tuple(slice(*span) for span in self.spans)]
        return tensor

    def packed(self) -> torch.Tensor:
        raise ValueError(f"{self.name} is stored as {self.format}, not in blocks")


class SafetensorsCheckpoint:
    """A folder; every shard is opened (mapped, not read) at once, so that a bad one shows early."""

    norms_include_one = False

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = read_json(path / "config.json")
        text = text_config(raw)
        self.config = raw if text is None else text
        self._bitnet: bitnet.BitNetLayout | None = None
        self._quantized: Quantized | None = None
        if quantization := self.config.get("quantization_config"):
            if not isinstance(quantization, dict):
                raise ConfigError(f"{path / 'config.json'}: quantization_config is no object")
            method = quantization.get("quant_method", "an unknown method")
            if method == bitnet.METHOD:
                self._bitnet = bitnet.read_layout(quantization)
            elif method not in (blocks.METHOD, stacked.METHOD):
                self._quantized = Quantized(quantization)
        files: dict[str, Any] = {}
        for shard in self._shards():
            file = _open(shard)
            files.update(dict.fromkeys(file.keys(), file))
        self._check_index(files)
        self._places: dict[str, tuple[Any, str]] = {}
        for stored, file in files.items():
            name = stored if text is None else text_name(stored)
            if name is not None:
                self._places[usual_name(self.config.get("model_type"), name)] = file, stored
        self._stacked = StackedExperts(self._places, self.config)
        self._fused = FusedTensors(self._stored_names(), self.config)

    def names(self) -> set[str]:
        return self._fused.names(self._stored_names())

    def tensor(self, name: str) -> HostTensor:
        return self._fused.tensor(name, self._stored) or self._stored(name)

    def _stored_names(self) -> set[str]:
        if self._quantized is not None:
            plain = {self._quantized.plain_name(name) for name in self._places}
            return {name for name in plain if name is not None}
        if self._bitnet is None:
            return self._stacked.names(blocks.plain_name(name) for name in self._places)
        return {name for name in self._places if not name.endswith(f".weight{SCALE}")}

    def _stored(self, name: str) -> HostTensor:
        for suffix in blocks.SUFFIXES:
            if (stored := self._slice(name + suffix)) is not None:
                return blocks.open_blocks(name, suffix, stored)
        if self._quantized is not None and (found := self._quantized.open(name, self._slice)):
            return found
        if (expert := self._stacked.open(name, self._slice)) is not None:
            return expert
        part = self._slice(name)
        if part is None:
            raise ConfigError(f"{self.path} has no tensor {name!r}")
        if self._bitnet is not None and self._bitnet.converts(name):
            beside = self._slice(name + SCALE)
            scale = beside[...] if beside is not None else None
            return self._bitnet.open(name, part, scale)
        if part.get_dtype() not in FORMATS:
            raise ConfigError(
                f"tensor {name!r} is stored as {part.get_dtype()}; "
                f"{', '.join(FORMATS)} can be loaded"
            )
        spans = tuple((0, size) for size in part.get_shape())
        return SafeTensor(name, part.get_dtype(), part, spans)

    def _slice(self, name: str) -> Any:
        """A stored tensor's, or None."""
        if name not in self._places:
            return None
        file, stored = self._places[name]
        return file.get_slice(stored)

    def rope_factors(self) -> list[float] | None:
        return None

    def _shards(self) -> list[Path]:
        """The files that the index names, `model.safetensors`, or whatever there is."""
        if (self.path / INDEX).exists():
            named = set(self._weight_map().values())
            return sorted(p for name in named if (p := self.path / name).exists())
        whole = self.path / "model.safetensors"
        shards = [whole] if whole.exists() else sorted(self.path.glob("*.safetensors"))
        if shards:
            return shards
        if any(self.path.glob("*.bin")):
            raise ConfigError(
                f"{self.path} holds only pickled weights (*.bin), which are never loaded because "
                "unpickling runs code; convert them to safetensors"
            )
        raise ConfigError(f"{self.path} holds no *.safetensors file")

    def _check_index(self, files: dict[str, Any]) -> None:
        if not (self.path / INDEX).exists():
            return
        for name, file in self._weight_map().items():
            if name not in files:
                raise ConfigError(
                    f"{INDEX} says that tensor {name!r} lies in {file}, but it does not; "
                    "a shard is missing or damaged"
                )

    def _weight_map(self) -> dict[str, str]:
        """Tensor name to file name; names that lead out of the folder are refused."""
        names = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in names.values()
        ):
            raise ConfigError(f"{self.path / INDEX} has no 'weight_map' of tensors to file names")
        return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return value


def _open(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{shard} is corrupt or truncated: {error}") from error
