"""Real models for tests: SmolLM2 always, Gemma where its terms have been accepted."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from engine.weights.gguf_header import ARRAY, MAGIC, SCALARS, STRING, TOKENIZER, read_header
from engine.weights.sources import resolve

TERMS_ACCEPTED = os.environ.get("RYZANSTEIN_ACCEPT_TERMS") == "1"


def smollm2_path() -> Path:
    return resolve("smollm2-135m")


def gemma3_path() -> Path:
    if not TERMS_ACCEPTED:
        pytest.skip("set RYZANSTEIN_ACCEPT_TERMS=1 to download Gemma under its terms")
    return resolve("gemma3-270m", accept_terms=lambda _: True)


def without_vocabulary(path: Path, folder: Path) -> Path:
    """A copy of a GGUF file with its weights alone: `transformers` reads the file twice, and each
    time makes an array of every byte string of a vocabulary."""
    data = memoryview(path.read_bytes())
    header = read_header(data, path.name)
    _, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    at, kept = 24, []
    for _ in range(pairs):
        start = at
        (length,) = struct.unpack_from("<Q", data, at)
        name = bytes(data[at + 8 : at + 8 + length]).decode()
        (kind,) = struct.unpack_from("<I", data, at + 8 + length)
        at = _behind(data, at + 12 + length, kind)
        if not name.startswith(TOKENIZER):
            kept.append(bytes(data[start:at]))
    infos = at
    for _ in range(tensors):
        (length,) = struct.unpack_from("<Q", data, at)
        (dimensions,) = struct.unpack_from("<I", data, at + 8 + length)
        at += 24 + length + 8 * dimensions
    size = f"{header.metadata['general.architecture']}.vocab_size"
    if size not in header.metadata:
        count = len(header.metadata["tokenizer.ggml.tokens"])
        kept.append(struct.pack(f"<Q{len(size)}sII", len(size), size.encode(), 4, count))
    head = struct.pack("<4sIQQ", MAGIC, version, tensors, len(kept)) + b"".join(kept)
    head += data[infos:at]
    align = header.metadata.get("general.alignment", 32)
    copy = folder / path.name
    with copy.open("wb") as file:
        file.write(head + bytes(-len(head) % align))
        file.write(data[at + -at % align :])
    return copy


def _behind(data: memoryview, at: int, kind: int) -> int:
    """Where a metadata value of some kind ends."""
    if kind == STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return int(at + 8 + length)
    if kind != ARRAY:
        return at + struct.calcsize(SCALARS[kind])
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind not in (STRING, ARRAY):
        return int(at + count * struct.calcsize(SCALARS[kind]))
    for _ in range(count):
        at = _behind(data, at, kind)
    return at
