"""The version of this program."""

from __future__ import annotations

from importlib import metadata


def _installed() -> str:
    try:
        return metadata.version("ryzanstein")
    except metadata.PackageNotFoundError:
        return "0+source"  # run from a tree that nobody installed


VERSION = _installed()
