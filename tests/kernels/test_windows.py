"""Layers with pages of their own for a window give what they give with all pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from kernels.tape import Recorder
from tests.kernels.native import needs_native
from tests.kernels.rings import CONTEXT, PAGES, SIZE, WINDOW_PAGES, ring_logits
from tests.tiny import SLIDING, WINDOWS, write_llama

KINDS = {"one layer slides": SLIDING, "all do": WINDOWS}


def logits(folder: Path, name: Any, cache: Any, windows: int) -> list[torch.Tensor]:
    backend, kept = select_backend(name, dtype="float32", cache_dtype=cache, threads=2)
    model = load_model(open_checkpoint(folder), backend)
    backend.allocate_cache(cache_layout(model, SIZE, kept, CONTEXT), PAGES, 0, windows)
    recorder = Recorder()
    program = backend.compile(recorder.finish(model.forward(recorder)), 64)
    found = ring_logits(program, windowed=windows > 0)
    backend.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "cache"), [
    ("reference", "auto"),
    ("torch", "auto"),
    pytest.param("native", "float32", marks=needs_native),
    pytest.param("native", "bfloat16", marks=needs_native),
    pytest.param("native", "int8", marks=needs_native),
])  # fmt: skip
def test_a_ring_of_window_pages_changes_nothing(
    tmp_path: Path, kind: str, name: str, cache: str
) -> None:
    folder = write_llama(tmp_path, **KINDS[kind])
    whole = logits(folder, name, cache, 0)
    for ours, theirs in zip(logits(folder, name, cache, WINDOW_PAGES), whole, strict=True):
        if name == "native":
            assert (ours == theirs).all()
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_tape_says_how_far_back_its_layers_see(tmp_path: Path) -> None:
    backend, _ = select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)
    for kind, found in (("one layer slides", {0: 40, 1: 0}), ("all do", {0: 40, 1: 40})):
        model = load_model(open_checkpoint(write_llama(tmp_path / kind, **KINDS[kind])), backend)
        recorder = Recorder()
        assert recorder.finish(model.forward(recorder)).windows() == found
        layout = cache_layout(model, SIZE, "float32")
        assert layout.window == 40
        assert layout.sliding == {layer for layer, window in found.items() if window}
        share = len(layout.sliding) / len(found)
        assert layout.bytes_per_window_page == share * layout.bytes_per_page
