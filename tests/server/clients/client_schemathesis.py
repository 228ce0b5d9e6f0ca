"""Schemathesis makes requests from the server's own description; none may be the server's fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.process import ServerProcess

pytest.importorskip("schemathesis", reason="pip install -e '.[clients]'")

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "25")


@pytest.mark.timeout(600)
def test_nothing_that_the_description_allows_is_a_server_error(
    mock: ServerProcess, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    command += [f"{mock.url}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--max-examples", EXAMPLES, "--phases", "examples,coverage,fuzzing"]
    command += ["--seed", "1", "--no-color", "--request-timeout", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert mock.idle(20)
