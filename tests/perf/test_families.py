"""The benchmark of families, on models small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.weights.checkpoint import open_checkpoint
from kernels.ops import DeltaHeads, Heads
from perf import families, random_model
from tests.kernels.native import needs_native

SMALL = {"hidden": 64, "wide": 32, "heads": Heads(4, 2, 16)}
EXPERTS: dict[str, Any] = SMALL | {"experts": 4, "used": 2}
GEMMA: dict[str, Any] = SMALL | {"heads": Heads(4, 1, 16), "inputs": 32}
DELTA: dict[str, Any] = SMALL | {"delta": DeltaHeads(2, 4, 16, 32, 4)}


@needs_native
@pytest.mark.parametrize(
    ("model", "kind", "sizes"),
    [
        ("qwen3-30b", "qwen3_moe", EXPERTS),
        ("gpt-oss-20b", "gpt_oss", EXPERTS),
        ("qwen3.5-0.8b", "qwen3_5_text", DELTA),
        ("gemma4-e2b", "gemma4_text", GEMMA),
    ],
)
def test_it_writes_a_model_and_times_its_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    kind: str,
    sizes: dict[str, Any],
) -> None:
    monkeypatch.setitem(families.SIZES, model, replace(families.SIZES[model], **sizes))
    for module in (families, random_model):
        monkeypatch.setattr(module, "VOCAB", 96)
    path = tmp_path / "model.gguf"
    families.main(
        model=model,  # type: ignore[arg-type]
        layers=10 if "gemma" in model else 4,
        decodes="1,3",
        prompts="20",
        threads=1,
        keep=path,
    )
    assert open_checkpoint(path).config["model_type"] == kind
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("1 decodes", "3 decodes", "prompt of 20"))
