"""Reads a GGUF file's header: metadata and where each tensor lies.

Written against the format's specification (ggml, docs/gguf.md) rather than on the `gguf` package's
reader, which builds an array object per metadata element and so needs ten seconds for a large
vocabulary. Every count and offset is checked against the file's size before it is believed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import ConfigError

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4
STRING, ARRAY, BOOL = 8, 9, 7
# Metadata value type -> struct format of the scalar types.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: logical shape (rows first), ggml type, and its bytes' place in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int


# Before a text.
LENGTH = struct.Struct("<Q")
# Keys of the tokenizer begin so.
TOKENIZER = "tokenizer."


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key, and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_header(data: memoryview, file: str, *, texts: bool = True) -> GGUFHeader:
    """Parse the header at the start of `data`, the whole file's bytes. Without `texts` the
    tokenizer's lists of them, most of the header, are left empty.

    Raises ConfigError naming the file, and the key or tensor at fault.
    """
    reader = _Reader(data, file)
    if bytes(data[:4]) != MAGIC:
        raise ConfigError(f"{file} is not a GGUF file: it does not start with 'GGUF'")
    reader.position = 4
    version = reader.scalar("I", "the version")
    if version not in (2, 3):
        raise ConfigError(f"{file} has GGUF version {version}; versions 2 and 3 can be read")
    tensor_count = reader.count(reader.scalar("Q", "the tensor count"), 24, "tensors")
    key_count = reader.count(reader.scalar("Q", "the key count"), 13, "metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string("a metadata key")
        read = reader.value if texts or not key.startswith(TOKENIZER) else reader.skim
        metadata[key] = read(f"key {key!r}")
    tensors = [_entry(reader) for _ in range(tensor_count)]
    return GGUFHeader(metadata, _place(reader, metadata, tensors))


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, ggml dimensions, type number and relative offset of the next tensor."""
    name = reader.string("a tensor's name")
    where = f"tensor {name!r}"
    dimensions = reader.scalar("I", where)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ConfigError(f"{reader.file}: {where} claims {dimensions} dimensions")
    shape = tuple(reader.scalar("Q", where) for _ in range(dimensions))
    return name, shape, reader.scalar("I", where), reader.scalar("Q", where)


def _place(
    reader: _Reader, metadata: dict[str, Any], entries: list[tuple[str, tuple[int, ...], int, int]]
) -> dict[str, TensorEntry]:
    """Turn relative offsets into checked byte ranges."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ConfigError(f"{reader.file}: key 'general.alignment' is {alignment!r}")
    base = -(-reader.position // alignment) * alignment
    tensors = {}
    for name, dimensions, number, offset in entries:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ConfigError(
                f"{reader.file}: tensor {name!r} has the unknown ggml type {number}"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in dimensions:
            raise ConfigError(f"{reader.file}: tensor {name!r} has a dimension of 0")
        if dimensions[0] % block:
            raise ConfigError(
                f"{reader.file}: tensor {name!r} has rows of {dimensions[0]} values, "
                f"not whole {kind.name} blocks of {block}"
            )
        elements = 1
        for dimension in dimensions:
            elements *= dimension
        size = elements // block * block_bytes
        start = base + offset
        if start + size > len(reader.data):
            raise ConfigError(
                f"{reader.file} is truncated: tensor {name!r} ends at byte {start + size}, "
                f"the file has {len(reader.data)}"
            )
        tensors[name] = TensorEntry(name, tuple(reversed(dimensions)), kind, start, size)
    return tensors


class _Reader:
    """A cursor over the bytes that never runs past their end."""

    def __init__(self, data: memoryview, file: str) -> None:
        self.data = data
        self.file = file
        self.position = 0

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self._need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return value

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # A vocabulary is hundreds of thousands: a call for each would be felt at every start.
        data, end, position = self.data, len(self.data), self.position
        found = []
        for _ in range(count):
            start = position + LENGTH.size
            if start > end:
                self._cut_off(what)
            position = start + LENGTH.unpack_from(data, position)[0]
            if position > end:
                self._cut_off(what)
            try:
                found.append(str(data[start:position], "utf-8"))
            except UnicodeDecodeError:
                raise ConfigError(f"{self.file}: {what} is not valid UTF-8") from None
        self.position = position
        return found

    def value(self, what: str) -> Any:
        kind = self.scalar("I", what)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise ConfigError(f"{self.file}: {what} has the unknown value type {kind}")
        value = self.scalar(SCALARS[kind], what)
        return bool(value) if kind == BOOL else value

    def skim(self, what: str) -> Any:
        """A value, or no texts in place of an array of them."""
        start = self.position
        if self.scalar("I", what) != ARRAY or self.scalar("I", what) != STRING:
            self.position = start
            return self.value(what)
        for _ in range(self.count(self.scalar("Q", what), 8, what)):
            length = self.scalar("Q", what)
            self._need(length, what)
            self.position += length
        return []

    def _array(self, what: str) -> list[Any]:
        kind = self.scalar("I", what)
        length = self.scalar("Q", what)
        if kind == STRING:
            return self.strings(self.count(length, LENGTH.size, what), what)
        if kind not in SCALARS:
            raise ConfigError(f"{self.file}: {what} is an array of the unknown type {kind}")
        item = np.dtype("<" + SCALARS[kind].replace("q", "i8").replace("Q", "u8"))
        length = self.count(length, item.itemsize, what)
        values = np.frombuffer(self.data, item, length, self.position)
        self.position += length * item.itemsize
        return list(values.astype(bool).tolist() if kind == BOOL else values.tolist())

    def count(self, count: int, least_bytes: int, what: str) -> int:
        """A count of items, believed only if so many could still follow."""
        self._need(count * least_bytes, what)
        return count

    def _need(self, size: int, what: str) -> None:
        if self.position + size > len(self.data):
            self._cut_off(what)

    def _cut_off(self, what: str) -> NoReturn:
        raise ConfigError(f"{self.file} is truncated or corrupt at {what}")
