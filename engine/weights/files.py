"""Which files a model is made of."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

# What llama.cpp's `llama-gguf-split` calls the parts of a model.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def weight_files(path: Path) -> list[Path]:
    """The files with the weights: of a folder its safetensors, of a GGUF file its parts."""
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    return gguf_parts(path)


def gguf_parts(path: Path) -> list[Path]:
    """All parts of a model of which `path` is one, the first first; `path` alone if its name does
    not say that there are others. Raises ConfigError naming the first that is missing."""
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    stem, number, count = found.groups()
    if not 1 <= int(number) <= int(count):
        raise ConfigError(f"{path.name}: there is no such part; the first is 00001")
    parts = [path.with_name(f"{stem}-{n:05}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    for part in parts:
        if not part.exists():
            raise ConfigError(
                f"{part.name} is missing: the model is in {int(count)} parts, which belong in one "
                "folder"
            )
    return parts


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read as they are needed. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def check_part(metadata: dict[str, Any], path: Path, number: int, parts: int) -> None:
    """Refuse a part that says of itself something else than its name does."""
    said = (metadata.get("split.no", 0), metadata.get("split.count", 1) or 1)
    if said != (number, parts):
        raise ConfigError(
            f"{path.name} says that it is number {said[0]!r}, from 0 on, of {said[1]!r} parts; "
            "they keep the names that they were split under, NAME-00001-of-00002.gguf and so on"
        )
