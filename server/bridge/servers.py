"""The operator's servers of the Model Context Protocol, and calls to them that cannot do harm.

    [servers.docs]
    url = "https://docs.example.com/mcp"
    headers = { Authorization = "Bearer ..." }
    allowed_tools = ["search"]

Every operation has a connection, a time limit and a size limit of its own; a server that keeps
failing is left alone for a while (circuit breaker, by `purgatory`).
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio
import msgspec
from msgspec import Meta
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from engine import ConfigError

if TYPE_CHECKING:
    from mcp import Client

logger = logging.getLogger("ryzanstein.server")
T = TypeVar("T")

MAX_TOOLS = 128
# Of everything that a server sends in one operation, and of what of a result a model is shown.
MAX_BYTES, MAX_TEXT = 4 << 20, 64 << 10
FAILURES, REST_SECONDS = 3, 30.0


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
    """A tool of a server."""

    server: str
    name: str
    description: str
    parameters: dict[str, Any]


class RemoteError(Exception):
    """A server did not do what was asked; the message is for the model and the client."""


class Servers:
    """All of them, by label."""

    def __init__(self, entries: dict[str, ServerEntry]) -> None:
        self.entries = entries
        self._breakers = AsyncCircuitBreakerFactory(FAILURES, REST_SECONDS)

    async def tools(self, label: str) -> list[RemoteTool]:
        """What a server offers, as far as it may be called. Raises RemoteError."""
        entry = self.entries[label]

        async def listed(client: Client) -> list[RemoteTool]:
            found, cursor = list[RemoteTool](), None
            while len(found) <= MAX_TOOLS:
                page = await client.list_tools(cursor=cursor)
                found += [
                    RemoteTool(label, t.name, t.description or "", dict(t.input_schema))
                    for t in page.tools
                    if not entry.allowed_tools or t.name in entry.allowed_tools
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
        outcome: T | RemoteError
        try:
            async with await self._breakers.get_breaker(label):
                with anyio.fail_after(seconds):
                    async with _connected(self.entries[label]) as client:
                        try:
                            outcome = await work(client)
                        except RemoteError as error:
                            outcome = error  # it answered: nothing is wrong with it
        except OpenedState:
            raise RemoteError(f"{label} has failed repeatedly and is left alone for now") from None
        except TimeoutError:
            raise RemoteError(f"{label} did not answer within {seconds:g} seconds") from None
        except (Exception, BaseExceptionGroup) as error:
            logger.warning("the MCP server %s failed: %s", label, _cause(error))
            raise RemoteError(f"{label} failed: {_cause(error)}") from error
        if isinstance(outcome, RemoteError):
            raise outcome
        return outcome


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
    return entries


@asynccontextmanager
async def _connected(entry: ServerEntry) -> AsyncIterator[Client]:
    from mcp import Client, StdioServerParameters
    from mcp.client.streamable_http import streamable_http_client

    from server.bridge.limits import limited_http

    if entry.command:
        program, *arguments = entry.command
        parameters = StdioServerParameters(command=program, args=arguments, env=dict(entry.env))
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


def _cause(error: BaseException) -> str:
    """The innermost of an error's causes, in a few words."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:200]
