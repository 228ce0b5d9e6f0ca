"""Servers that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import ServerProcess
from tests.tiny import write_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`ryzanstein serve` on a tiny random model, as users start it."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny")
    arguments = ("--model", str(folder), "--dtype", "float32", "--set", "cache.tokens=8192")
    with ServerProcess(*arguments) as server:
        yield server
        assert server.idle(), "the tests left something running"


MockFactory = Callable[..., ServerProcess]


@pytest.fixture
def mock_server() -> Iterator[MockFactory]:
    """Starts servers around the mock model; keyword arguments are the engine's."""
    with ExitStack() as stack:

        def start(settings: dict[str, object] | None = None, **engine: object) -> ServerProcess:
            env = {"MOCK_ENGINE": json.dumps(engine), "MOCK_SERVER": json.dumps(settings or {})}
            process = ServerProcess(module="tests.server.mock_server", env=env)
            return stack.enter_context(process)

        yield start


@pytest.fixture
def batch_server(tmp_path: Path) -> Iterator[MockFactory]:
    """Starts servers that keep files and batches in one folder, one after the other."""
    with ExitStack() as stack:

        def start(**options: Any) -> ServerProcess:
            return stack.enter_context(batch_process(tmp_path, **options))

        yield start


def batch_process(
    folder: Path, *, max_running: int = 4, most: int = 1 << 30, **engine: object
) -> ServerProcess:
    """A mock server that keeps files and batches in `folder`, `most` bytes of each owner."""
    section = {"folder": str(folder), "max_running": max_running, "max_owner_bytes": most}
    engine = {"pages": 512, **engine}
    env = {"MOCK_ENGINE": json.dumps(engine), "MOCK_BATCHES": json.dumps(section)}
    return ServerProcess(module="tests.server.mock_server", env=env)


@pytest.fixture(scope="session")
def roomy() -> Iterator[ServerProcess]:
    """The same with room for prompts that show tools."""
    env = {"MOCK_ENGINE": json.dumps({"pages": 2048, "page_size": 16, "context": 8000})}
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        yield server
        assert server.idle(), "the tests left something running"


@pytest.fixture(scope="session")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A shared mock server: text is known in advance, steps are fast."""
    env = {"MOCK_ENGINE": json.dumps({"pages": 512, "context": 400, "delay": 0.001})}
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        yield server
        assert server.idle(), "the tests left something running"
