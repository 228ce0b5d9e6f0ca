"""The step profile on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.server.process import ROOT
from tests.tiny import write_llama


def test_every_part_of_a_step_is_reported(tmp_path: Path) -> None:
    model, file = write_llama(tmp_path / "tiny"), tmp_path / "step.json"
    command = [sys.executable, "-m", "perf.step", "--model", str(model), "--streams", "1,4"]
    command += ["--prompt-tokens", "8", "--tokens", "200", "--json", str(file)]
    command += ["--set", "cache.tokens=2048", "--set", "model.dtype=float32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    one, four = json.loads(file.read_text())
    assert (one["streams"], four["streams"]) == (1, 4)
    for part in ("plan", "fill", "forward", "sample", "commit", "stream"):
        assert 0 < four[f"{part}_us"] < four["step_us"]
    assert four["python_us"] < four["step_us"]
    assert four["loop_lag_p50_us"] <= four["loop_lag_p99_us"]
    assert four["alone_us"] > 0
    assert abs(four["slowed_us"]) < four["step_us"]
    assert four["loop_cpu_us"] > 0
