"""Checks a model's files against a list as `sha256sum` writes it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from engine.errors import ConfigError
from engine.weights.files import weight_files

LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def check_files(model: Path, sums: str, rank: int = 0, ranks: int = 1) -> None:
    """Check the weights' files, of which this rank has every `ranks`-th; `sums` names the list,
    beside the model or anywhere.

    Raises ConfigError naming the first file that is not what the list says, or not on it.
    """
    folder = model if model.is_dir() else model.parent
    listed = _read(folder / sums)
    for file in weight_files(model)[rank::ranks]:
        if file.name not in listed:
            raise ConfigError(f"{sums} does not list {file.name}")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != listed[file.name]:
            raise ConfigError(f"{file} is not the file that {sums} lists; download it again")


def _read(path: Path) -> dict[str, str]:
    """Names and digests."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.checksums: cannot read {path}: {error}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        matched = LINE.fullmatch(line)
        if matched is None:
            raise ConfigError(f"{path}, line {number}: this is no line of sha256sum's")
        found[Path(matched[2]).name] = matched[1].lower()
    return found
