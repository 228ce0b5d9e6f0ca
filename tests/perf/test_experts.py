"""The benchmark of experts, on a model small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.weights.checkpoint import open_checkpoint
from kernels.ops import Heads
from perf import experts
from tests.kernels.native import needs_native


@needs_native
def test_it_writes_a_model_and_times_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("HIDDEN", 64), ("WIDE", 32), ("EXPERTS", 4), ("USED", 2), ("VOCAB", 96)):
        monkeypatch.setattr(experts, name, size)
    monkeypatch.setattr(experts, "HEADS", Heads(4, 2, 16))
    path = tmp_path / "model.gguf"
    experts.main(layers=2, decodes="1,3", prompts="20", threads=1, keep=path)
    config = open_checkpoint(path).config
    assert (config["model_type"], config["num_local_experts"]) == ("qwen3_moe", 4)
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("1 decodes", "3 decodes", "prompt of 20"))
