"""The operator's servers of the Model Context Protocol, and calls to them that cannot do harm.

    [servers.docs]
    url = "https://docs.example.com/mcp"
    headers = { Authorization = "Bearer ..." }
    allowed_tools = ["search"]

Every operation has a connection, a time limit and a size limit of its own; a server that keeps
failing is left alone for a while (circuit breaker).
"""

from __future__ import annotations

import logging
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio
import msgspec
from msgspec import Meta

from engine import ConfigError
from server.tools import NAME

if TYPE_CHECKING:
    from mcp import Client

logger = logging.getLogger("ryzanstein.server")
T = TypeVar("T")

MAX_TOOLS = 128
# Connections to one server.
MAX_AT_ONCE = 16
# Of everything that a server sends in one operation, and of what of a result a model is shown.
MAX_BYTES, MAX_TEXT = 4 << 20, 64 << 10
# A command's lines, each of which is a message; and what counts them.
MAX_LINES = 2000
RELAY = Path(__file__).with_name("relay.py")
FAILURES, REST_SECONDS = 3, 30.0
# JSON-RPC's codes for a connection that closed and a server that broke.
BROKEN = (-32000, -32603)


class ServerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server: at a `url`, or a `command` that speaks on its standard input and output. With
    `allowed_tools` only these can be called."""

    url: str = ""
    command: tuple[str, ...] = ()
    headers: dict[str, str] = {}
    env: dict[str, str] = {}
    allowed_tools: tuple[str, ...] = ()
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 30.0


class ServerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    servers: dict[str, ServerEntry]


class RemoteTool(msgspec.Struct, frozen=True):
    """A tool of a server. Whether it `asks`, so that its calls wait for the client's approval, is
    the request's wish."""

    server: str
    name: str
    description: str
    parameters: dict[str, Any]
    asks: bool = False


class ToolCall(msgspec.Struct, frozen=True):
    """A call that was made for an answer, with its trace; times are monotonic seconds."""

    trace: str
    server: str
    tool: str
    begun: float
    ended: float
    failed: bool


class RemoteError(Exception):
    """A server did not do what was asked; the message is for the model and the client."""


class Breaker:
    """Counts a server's failures in a row; after some it rests, and then one opens it again."""

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the server is left alone now."""
        return time.monotonic() < self._until

    def note(self, *, failed: bool) -> None:
        """How an operation went."""
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= FAILURES:
            self._until = time.monotonic() + REST_SECONDS


class Servers:
    """All of them, by label."""

    def __init__(self, entries: dict[str, ServerEntry]) -> None:
        self.entries = entries
        self.on_call: Callable[[ToolCall], None] | None = None
        """Told of every call."""
        self._breakers = {label: Breaker() for label in entries}
        self._limits = {label: anyio.CapacityLimiter(MAX_AT_ONCE) for label in entries}

    async def tools(self, label: str) -> list[RemoteTool]:
        """What a server offers, as far as it may be called. Raises RemoteError."""
        entry = self.entries[label]

        async def listed(client: Client) -> list[RemoteTool]:
            found, cursor = list[RemoteTool](), None
            while len(found) <= MAX_TOOLS:
                page = await client.list_tools(cursor=cursor)
                # Models and clients know such names only.
                found += [
                    RemoteTool(label, t.name, t.description or "", dict(t.input_schema))
                    for t in page.tools
                    if (not entry.allowed_tools or t.name in entry.allowed_tools)
                    and NAME.fullmatch(t.name)
                ]
                cursor = page.next_cursor
                if cursor is None:
                    return found
            raise RemoteError(f"{label} offers more than {MAX_TOOLS} tools; set allowed_tools")

        return await self._do(label, listed)

    async def call(self, label: str, name: str, arguments: dict[str, Any]) -> str:
        """A tool's result as text. Raises RemoteError."""

        async def called(client: Client) -> str:
            result = await client.call_tool(name, arguments)
            text = _text(result.content)
            if result.is_error:
                raise RemoteError(text or "the tool failed")
            return text

        return await self._do(label, called)

    async def _do(self, label: str, work: Callable[[Client], Awaitable[T]]) -> T:
        """Connect, work, and disconnect, within the server's time."""
        seconds = self.entries[label].timeout_seconds
        # The first time it takes as long as much of the server: not on the loop, nor of its time.
        await anyio.to_thread.run_sync(_load_sdk)
        breaker = self._breakers[label]
        if breaker.is_open:
            raise RemoteError(f"{label} has failed repeatedly and is left alone for now")
        try:
            with anyio.fail_after(seconds):
                async with self._limits[label], _connected(self.entries[label]) as client:
                    outcome = await _answer(client, work)
        except TimeoutError:
            breaker.note(failed=True)
            raise RemoteError(f"{label} did not answer within {seconds:g} seconds") from None
        except BaseExceptionGroup as group:
            if not isinstance(group, ExceptionGroup):
                raise
            raise self._failed(label, group) from group
        except Exception as error:
            raise self._failed(label, error) from error
        breaker.note(failed=False)
        if isinstance(outcome, RemoteError):
            raise outcome
        return outcome

    def _failed(self, label: str, error: Exception) -> RemoteError:
        """What is told of a failure; what it says itself may hold the server's secrets."""
        from server.bridge.limits import TooLarge

        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, TooLarge):
            return RemoteError(f"{label}: {cause}")
        self._breakers[label].note(failed=True)
        logger.warning("the MCP server %s failed: %s", label, type(cause).__name__)
        return RemoteError(f"{label} could not be reached, or did not speak the protocol")


async def _answer(client: Client, work: Callable[[Client], Awaitable[T]]) -> T | RemoteError:
    """What a server answered, errors included: then nothing is wrong with it."""
    from mcp.shared.exceptions import MCPError

    try:
        return await work(client)
    except RemoteError as error:
        return error
    except MCPError as error:
        if error.error.code in BROKEN:
            raise
        return RemoteError(error.error.message[:300])


def read_servers(file: Path) -> dict[str, ServerEntry]:
    """The file's servers. Raises ConfigError in one sentence."""
    try:
        entries = msgspec.convert(tomllib.loads(file.read_text("utf-8")), ServerFile).servers
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}") from error
    for label, entry in entries.items():
        if bool(entry.url) == bool(entry.command):
            raise ConfigError(f"{file}: servers.{label} needs either a url or a command")
        if entry.url and not entry.url.startswith(("http://", "https://")):
            raise ConfigError(f"{file}: servers.{label}.url must begin with http:// or https://")
        if not all(value.isprintable() for value in entry.headers.values()):
            raise ConfigError(f"{file}: servers.{label}.headers hold a character that is none")
    return entries


@asynccontextmanager
async def _connected(entry: ServerEntry) -> AsyncIterator[Client]:
    from mcp import Client, StdioServerParameters
    from mcp.client.streamable_http import streamable_http_client

    from server.bridge.limits import limited_http

    if entry.command:
        limits = (str(RELAY), str(MAX_BYTES), str(MAX_LINES))
        parameters = StdioServerParameters(
            command=sys.executable, args=[*limits, *entry.command], env=dict(entry.env)
        )
        async with Client(parameters, cache=None) as client:
            yield client
        return
    async with limited_http(entry.headers, entry.timeout_seconds, MAX_BYTES) as http:
        transport = streamable_http_client(entry.url, http_client=http)
        async with Client(transport, cache=None) as client:
            yield client


def _load_sdk() -> None:
    """Import what speaks the protocol."""

    import server.bridge.limits  # noqa: F401


def _text(content: Any) -> str:
    """What of a result can be shown to a model of text."""
    parts = [part.text if part.type == "text" else f"[{part.type}]" for part in content]
    text = "\n".join(parts)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "\n[the rest is left out]"
