"""Real models for tests: SmolLM2 always, Gemma where its terms have been accepted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.weights.sources import resolve

TERMS_ACCEPTED = os.environ.get("RYZANSTEIN_ACCEPT_TERMS") == "1"


def smollm2_path() -> Path:
    return resolve("smollm2-135m")


def gemma3_path() -> Path:
    if not TERMS_ACCEPTED:
        pytest.skip("set RYZANSTEIN_ACCEPT_TERMS=1 to download Gemma under its terms")
    return resolve("gemma3-270m", accept_terms=lambda _: True)
