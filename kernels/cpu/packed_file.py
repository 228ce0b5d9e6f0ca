"""Packed weights on disk, so that the next start only copies them.

The file is a magic line, a JSON header (what the weights were made from, and each one's format,
shape and size), and the packed bytes, one weight after the other. It is written beside its name and
moved into place, so a reader sees all of it or nothing; one that does not fit is made anew. It is
mapped and copied, not used in place: weights on a file's small pages cost a sixth of the speed at
one row.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("ryzanstein.kernels")

# Changes whenever the packed layouts do.
MAGIC = b"ryzanstein packed weights 2\n"
LONGEST_HEADER = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One weight: its packed format's number, logical shape, and size in bytes."""

    format: int
    rows: int
    columns: int
    bytes: int


class PackedFile:
    """The packed weights of one model under one `key`: found in the file, or collected for it."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._found: dict[str, tuple[Entry, npt.NDArray[np.uint8]]] = {}
        self._made: dict[str, tuple[Entry, Any]] = {}
        try:
            self._open()
        except FileNotFoundError:
            pass  # a first start
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is damaged, the weights are packed anew: %s", path, error)

    def copy(self, name: str, weight: Any, rows: int, columns: int) -> bool:
        """Fill a native weight from the file; False if the file does not have it so."""
        if name not in self._found:
            return False
        entry, stored = self._found[name]
        if entry != Entry(weight.format, rows, columns, weight.bytes):
            return False
        _bytes_of(weight)[:] = stored
        # Should others have to be packed, the next file has all of them.
        self._made[name] = (entry, weight)
        return True

    def collect(self, name: str, weight: Any, rows: int, columns: int) -> None:
        """Remember a weight that had to be packed, to be written by `save`."""
        self._made[name] = (Entry(weight.format, rows, columns, weight.bytes), weight)

    def save(self) -> None:
        """Write the collected weights. A folder that cannot be written costs the next start its
        speed, and nothing else: it is logged."""
        try:
            self._write()
        except OSError as error:
            logger.warning("packed weights were not kept for the next start: %s", error)

    def _open(self) -> None:
        with self.path.open("rb") as file:
            if file.readline(len(MAGIC)) != MAGIC:
                return  # of another version
            header = json.loads(file.readline(LONGEST_HEADER))
            start = file.tell()
        if header["key"] != self.key:
            return
        entries = {str(name): Entry(*values) for name, values in header["weights"].items()}
        sizes = [entry.bytes for entry in entries.values()]
        if min(sizes, default=0) < 0 or start + sum(sizes) != self.path.stat().st_size:
            raise ValueError("its size is not what its header says")
        data = np.memmap(self.path, np.uint8, "r")
        for name, entry in entries.items():
            self._found[name] = (entry, data[start : start + entry.bytes])
            start += entry.bytes

    def _write(self) -> None:
        weights = {name: astuple(entry) for name, (entry, _) in self._made.items()}
        header = json.dumps({"key": self.key, "weights": weights}).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            with draft.open("wb") as file:
                file.write(MAGIC + header)
                for _, weight in self._made.values():
                    _bytes_of(weight).tofile(file)
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)


def _bytes_of(weight: Any) -> npt.NDArray[np.uint8]:
    """A view of a native weight's memory."""
    pointer = ctypes.cast(weight.address, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, (weight.bytes,))
