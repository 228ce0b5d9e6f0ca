"""Under a limit that the cache would break, the pool gives way, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny import write_llama

MB = 2**20
WIDE = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 64}


def serve(model: Path, allowed: int) -> Any:
    module = "tests.engine.execution.squeeze"
    command = [sys.executable, "-m", module, str(model), str(allowed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cache_that_would_not_fit_shrinks_and_every_request_is_served(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny", **WIDE)
    free = serve(model, 1024 * MB)
    tight = serve(model, 60 * MB)
    assert free["in_use"] == free["pages"]
    assert free["peak"] > 80  # it would have been killed
    assert tight["in_use"] < tight["pages"]
    assert tight["texts"] == free["texts"]
