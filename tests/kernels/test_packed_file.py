"""Packed weights that were kept: found again, equal, and never trusted when they do not fit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from engine import AsyncEngine, SamplingParams
from kernels.cpu import native_weights, packed_file
from kernels.cpu.native_backend import NativeBackend
from kernels.cpu.native_weights import NativeWeights
from kernels.cpu.packed_file import PackedFile, _bytes_of
from tests.kernels.native import Host, needs_native, quantized
from tests.tiny import write_llama

pytestmark = needs_native
WEIGHTS = {
    "q4": quantized(Type.Q4_1, 40, 64),
    "q8": quantized(Type.Q8_0, 33, 96),
    "dense": Host(torch.randn(20, 10, generator=torch.Generator().manual_seed(1))),
}
# With their rows: several weights may be made of one tensor's.
NAMES = {f"{name}:{host.shape[0]}" for name, host in WEIGHTS.items()}


def load(path: Path, key: str) -> tuple[PackedFile, dict[str, bytes]]:
    """Load all weights through a packed file; returns it and their bytes."""
    file = PackedFile(path, key)
    backend = NativeBackend("auto", 1, packed_file=file)
    found = {}
    for name, host in WEIGHTS.items():
        named = Host(host.values, host.format, host.blocks, name=name)
        found[name] = _bytes_of(backend.load([named]).packed).tobytes()
    return file, found


def keep(path: Path, key: str = "first") -> dict[str, bytes]:
    file, found = load(path, key)
    file.save()
    return found


def test_a_second_start_copies_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "model.packed"
    packed = keep(path)
    assert [p.name for p in path.parent.iterdir()] == ["model.packed"]

    def fail(*_: object) -> None:
        raise AssertionError("packed although it was kept")

    monkeypatch.setattr(NativeWeights, "_pack", fail)
    assert load(path, "first")[1] == packed


def test_another_source_is_packed_anew_and_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "model.packed"
    packed = keep(path)
    assert PackedFile(path, "second")._found == {}
    assert keep(path, "second") == packed
    assert PackedFile(path, "first")._found == {}
    assert set(PackedFile(path, "second")._found) == NAMES


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "sizes", "other version"])
def test_a_damaged_file_is_not_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.packed"
    packed = keep(path)
    raw = path.read_bytes()
    path.write_bytes(
        {
            "cut": raw[:-100],
            "grown": raw + b"x",
            "header": raw.replace(b'"weights"', b'"weight_"'),
            "sizes": raw.replace(b"[3, 40, 64, ", b"[3, 40, 64, -"),
            "other version": raw.replace(packed_file.MAGIC, b"ryzanstein packed weights 0\n"),
        }[damage]
    )
    assert path.read_bytes() != raw
    with caplog.at_level(logging.WARNING, packed_file.logger.name):
        assert load(path, "first")[1] == packed
    assert ("damaged" in caplog.text) == (damage != "other version")


def test_a_folder_that_cannot_be_written_costs_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, packed_file.logger.name):
        keep(tmp_path / "file" / "model.packed")
    assert "not kept" in caplog.text


async def test_an_engine_keeps_what_took_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path / "cache"))
    model = str(write_llama(tmp_path / "tiny"))

    async def answer(**settings: object) -> list[int]:
        ids: list[int] = []
        async with AsyncEngine.from_pretrained(model, cache__tokens=512, **settings) as engine:
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            async for delta in engine.generate("Hello", params):
                ids += delta.token_ids
        return ids

    expected = await answer()
    assert not (tmp_path / "cache/packed").exists()  # it took no time
    monkeypatch.setattr(native_weights, "WORTH_KEEPING_SECONDS", -1.0)
    assert await answer(model__keep_packed=False) == expected
    assert not (tmp_path / "cache/packed").exists()
    assert await answer() == expected
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 1
    assert await answer() == expected


def test_a_file_that_lacks_some_weights_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "model.packed"
    packed = keep(path)
    file = PackedFile(path, "first")
    del file._found["q8:33"]
    backend = NativeBackend("auto", 1, packed_file=file)
    for name, host in WEIGHTS.items():
        backend.load([Host(host.values, host.format, host.blocks, name=name)])
    file.save()
    assert load(path, "first")[1] == packed
    assert set(PackedFile(path, "first")._found) == NAMES
