"""A server whose operator has named another server's tools."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.bridge.test_servers import OtherServer
from tests.server.process import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with OtherServer() as other:
        file = tmp_path_factory.mktemp("mcp") / "mcp.toml"
        file.write_text(
            f'[servers.it]\nurl = "{other.url}/mcp"\ntimeout_seconds = 5\n'
            '[servers.gone]\nurl = "http://127.0.0.1:9/mcp"\ntimeout_seconds = 1\n'
        )
        engine = {"pages": 2048, "page_size": 16, "context": 8000}
        env = {
            "MOCK_ENGINE": json.dumps(engine),
            "MOCK_SERVER": json.dumps({"mcp_file": str(file)}),
        }
        with ServerProcess(module="tests.server.mock_server", env=env) as server:
            yield server
            assert server.idle()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
