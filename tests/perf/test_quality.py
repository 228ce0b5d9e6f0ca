"""The quality table on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from perf.quality import FORMATS
from tests.kernels.native import needs_native
from tests.server.process import ROOT
from tests.tiny import write_llama


@needs_native
def test_every_format_is_scored_on_the_same_tokens(tmp_path: Path) -> None:
    model, file = write_llama(tmp_path / "tiny", head_dim=64), tmp_path / "out.json"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    command = [sys.executable, "-m", "perf.quality", "--model", str(model), "--text", str(text)]
    command += ["--windows", "2", "--length", "100", "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())
    assert [row["tokens"] for row in rows] == [198] * len(FORMATS)
    assert rows[0]["same top token"] == "100.00%"
    for row in rows[1:]:
        assert abs(row["perplexity"] / rows[0]["perplexity"] - 1) < 0.05
