"""Calls to servers of the Model Context Protocol, useful and hostile ones."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from engine import ConfigError
from server.bridge.servers import (
    FAILURES,
    MAX_TEXT,
    RemoteError,
    ServerEntry,
    Servers,
    read_servers,
)

OTHER = [sys.executable, "-m", "tests.server.bridge.other_server"]


class OtherServer:
    """One in a process of its own."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen([*OTHER, str(self.port)], cwd=Path(__file__).parents[3])
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(400):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("it did not start")

    def __enter__(self) -> OtherServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def other() -> Iterator[OtherServer]:
    with OtherServer() as server:
        yield server


def at(url: str, **more: object) -> Servers:
    return Servers({"it": ServerEntry(url=url, **{"timeout_seconds": 5.0, **more})})  # type: ignore[arg-type]


async def test_tools_are_listed_and_called(other: OtherServer) -> None:
    servers = at(f"{other.url}/mcp")
    tools = {tool.name: tool for tool in await servers.tools("it")}
    assert tools["weather"].parameters["required"] == ["city"]
    assert await servers.call("it", "weather", {"city": "Rome"}) == "It rains in Rome."


async def test_tools_whose_names_are_none_are_left_out(other: OtherServer) -> None:
    names = {tool.name for tool in await at(f"{other.url}/mcp").tools("it")}
    assert "weather" in names
    assert "a/b" not in names


async def test_only_what_is_allowed_is_offered(other: OtherServer) -> None:
    servers = at(f"{other.url}/mcp", allowed_tools=("weather",))
    assert [tool.name for tool in await servers.tools("it")] == ["weather"]


async def test_a_command_speaks_on_its_pipes() -> None:
    entry = ServerEntry(command=tuple(OTHER), timeout_seconds=30)
    servers = Servers({"it": entry})
    assert await servers.call("it", "weather", {"city": "Oslo"}) == "It rains in Oslo."


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('x' * 65536, end='')",
        "while True: print('x')",
        "print('{', flush=True); import time; time.sleep(0.2)",
        "import os; os.close(1); import time; time.sleep(100)",
    ],
    ids=["no line ends", "lines without end", "dies in a line", "closes its pipe"],
)
async def test_a_hostile_command_ends_at_its_limits(program: str) -> None:
    entry = ServerEntry(command=(sys.executable, "-u", "-c", program), timeout_seconds=20)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="did not speak the protocol"):
        await Servers({"it": entry}).tools("it")
    assert time.monotonic() - begin < 15


async def test_a_tools_failure_is_its_answer(other: OtherServer) -> None:
    servers = at(f"{other.url}/mcp")
    for _ in range(FAILURES + 1):  # and no fault of the server's
        with pytest.raises(RemoteError, match="it broke"):
            await servers.call("it", "fail", {})
    assert await servers.call("it", "weather", {"city": "Rome"})


async def test_long_results_are_cut(other: OtherServer) -> None:
    text = await at(f"{other.url}/mcp").call("it", "long", {})
    assert text.endswith("[the rest is left out]")
    assert len(text) < MAX_TEXT + 100


@pytest.mark.parametrize("path", ["/flood", "/lie", "/nonsense", "/redirect", "/nowhere"])
async def test_hostile_servers_cost_their_time_limit_at_most(other: OtherServer, path: str) -> None:
    servers = at(other.url + path, timeout_seconds=1.5)
    begin = time.monotonic()
    with pytest.raises(RemoteError):
        await servers.tools("it")
    assert time.monotonic() - begin < 4


async def test_more_than_is_taken_is_refused(other: OtherServer) -> None:
    with pytest.raises(RemoteError, match="more than 4194304 bytes"):
        await at(f"{other.url}/mcp", timeout_seconds=10).call("it", "huge", {})


async def test_a_hanging_tool_ends_at_its_time(other: OtherServer) -> None:
    with pytest.raises(RemoteError, match="did not answer within 1 seconds"):
        await at(f"{other.url}/mcp", timeout_seconds=1).call("it", "hang", {})


async def test_a_server_that_dies_or_is_not_there_is_left_alone_after_a_while() -> None:
    with OtherServer() as server:
        servers = at(f"{server.url}/mcp", timeout_seconds=3)
        with pytest.raises(RemoteError, match="it"):
            await servers.call("it", "die", {})
        server.process.wait(5)
        for _ in range(FAILURES - 1):
            with pytest.raises(RemoteError, match=r"could not be reached|did not answer"):
                await servers.call("it", "weather", {"city": "Rome"})
        begin = time.monotonic()
        with pytest.raises(RemoteError, match="left alone"):
            await servers.call("it", "weather", {"city": "Rome"})
        assert time.monotonic() - begin < 0.5


async def test_who_leaves_says_nothing_of_the_server(other: OtherServer) -> None:
    servers = at(f"{other.url}/mcp", timeout_seconds=20.0)
    for _ in range(FAILURES + 1):
        with anyio.move_on_after(0.3):
            await servers.call("it", "hang", {})
    assert await servers.call("it", "weather", {"city": "Rome"})


async def test_nothing_secret_is_told(caplog: pytest.LogCaptureFixture) -> None:
    servers = at("http://127.0.0.1:9/mcp?key=SECRET", headers={"authorization": "Bearer SECRET"})
    with caplog.at_level("DEBUG"), pytest.raises(RemoteError) as failed:
        await servers.tools("it")
    assert "SECRET" not in str(failed.value)
    assert not [r for r in caplog.records if r.levelname != "DEBUG" and "SECRET" in r.getMessage()]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[servers.a]", "either a url or a command"),
        ('[servers.a]\nurl = "http://x"\ncommand = ["y"]', "either a url or a command"),
        ('[servers.a]\nurl = "file:///etc"', "must begin with http"),
        ("[servers.a]\nport = 1", "port"),
        ('[servers.a]\nurl = "http://x"\nheaders = { a = "b\\n" }', "headers hold a character"),
        ("[servers", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mcp.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_servers(file)


def test_the_shipped_example_is_read() -> None:
    assert "docs" in read_servers(Path(__file__).parents[3] / "configs" / "mcp.toml")
