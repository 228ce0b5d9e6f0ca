"""The benchmark of experts, on models small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.weights.checkpoint import open_checkpoint
from kernels.ops import Heads
from perf import experts
from tests.kernels.native import needs_native


@needs_native
@pytest.mark.parametrize(
    ("model", "kind"), [("qwen3-30b", "qwen3_moe"), ("gpt-oss-20b", "gpt_oss")]
)
def test_it_writes_a_model_and_times_its_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    kind: str,
) -> None:
    sizes = {"hidden": 64, "wide": 32, "experts": 4, "used": 2, "heads": Heads(4, 2, 16)}
    monkeypatch.setitem(experts.SIZES, model, replace(experts.SIZES[model], **sizes))
    monkeypatch.setattr(experts, "VOCAB", 96)
    path = tmp_path / "model.gguf"
    experts.main(
        model=model,  # type: ignore[arg-type]
        layers=2,
        decodes="1,3",
        prompts="20",
        threads=1,
        keep=path,
    )
    config = open_checkpoint(path).config
    assert (config["model_type"], config["num_local_experts"]) == (kind, 4)
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("1 decodes", "3 decodes", "prompt of 20"))
