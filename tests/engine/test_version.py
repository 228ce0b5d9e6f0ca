"""The program's version, installed or not."""

from __future__ import annotations

from importlib import metadata

import pytest

from engine import version


def test_it_is_the_installed_packages() -> None:
    assert metadata.version("ryzanstein") == version.VERSION


def test_a_tree_that_nobody_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert version._installed() == "0+source"
