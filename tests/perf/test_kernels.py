"""The table of ops, on the smallest of its shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import kernels
from tests.kernels.native import needs_native


@needs_native
def test_every_kind_of_op_is_timed_beside_the_ceilings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "FORMATS", {"q4": kernels.FORMATS["q4"]})
    monkeypatch.setattr(kernels, "CACHE_FORMATS", {"int8": kernels.CACHE_FORMATS["int8"]})
    monkeypatch.setattr(kernels, "SHAPES", {"out": kernels.SHAPES["out"]})
    file = tmp_path / "ops.json"
    kernels.main(threads="1", rows="1,4", context=32, json_file=file)
    found = {(row["op"], row["rows"]) for row in json.loads(file.read_text())}
    decodes = {(op, count) for op in ("linear", "attention") for count in (1, 4)}
    rowwise = {(op, count) for op in ("rms_norm", "add_rms_norm", "gated") for count in (1, 32)}
    assert found == decodes | rowwise | {("attention", 256), ("attention", 1024)}
    assert "GOP/s, reading" in capsys.readouterr().out


def test_rounds_share_the_best_ceiling_of_sums_and_the_median_one_of_reading() -> None:
    rounds = [
        kernels.Ceilings(dict.fromkeys(kernels.PROBES, speed), read)
        for speed, read in ((4.0, 9.0), (2.0, 1.0), (3.0, 5.0))
    ]
    assert kernels.together(rounds) == kernels.Ceilings(dict.fromkeys(kernels.PROBES, 4.0), 5.0)
