"""Files are checked by a list of sha256sum's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from engine import ConfigError
from engine.weights.checksums import check_files


def listed(folder: Path) -> str:
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(folder.glob("*.safetensors"))
    ]
    return "".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"part-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    (tmp_path / "SUMS").write_text(listed(tmp_path))
    return tmp_path


def test_what_is_listed_and_unchanged_passes(folder: Path) -> None:
    check_files(folder, "SUMS")


def test_a_damaged_file_is_named_by_the_rank_that_has_it(folder: Path) -> None:
    file = folder / "part-1.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    check_files(folder, "SUMS", rank=0, ranks=2)
    with pytest.raises(ConfigError, match=r"part-1\.safetensors is not the file that SUMS lists"):
        check_files(folder, "SUMS", rank=1, ranks=2)


def test_a_file_that_is_not_listed_is_an_error(folder: Path) -> None:
    (folder / "part-9.safetensors").write_bytes(b"new")
    with pytest.raises(ConfigError, match=r"SUMS does not list part-9\.safetensors"):
        check_files(folder, "SUMS")


def test_one_file_is_looked_up_beside_itself(folder: Path) -> None:
    model = folder / "model.gguf"
    model.write_bytes(b"weights")
    (folder / "SUMS").write_text(f"{hashlib.sha256(b'weights').hexdigest()} *model.gguf\n")
    check_files(model, "SUMS")
    model.write_bytes(b"others")
    with pytest.raises(ConfigError, match="download it again"):
        check_files(model, "SUMS")


def test_a_list_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        check_files(folder, "MISSING")
    (folder / "SUMS").write_text("hello\n")
    with pytest.raises(ConfigError, match="line 1"):
        check_files(folder, "SUMS")
