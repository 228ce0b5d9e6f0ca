"""Tenants: from an API key to who is asking, by a file that is read again when it changes.

    [tenants.team-a]
    keys = ["sk-...", "sha256:9f86d0..."]   # as they are, or as digests that tell nothing
    weight = 2

A request without a tenants file belongs to the one tenant that everybody is.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
from msgspec import Meta
from starlette.requests import HTTPConnection

from engine import ConfigError
from engine.scheduling.tenants import Tenant

logger = logging.getLogger("ryzanstein.server")

RELOAD_SECONDS = 1.0
DIGEST = "sha256:"


class TenantEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant of the file; limits as in `Tenant`, all but the keys may be left out."""

    keys: Annotated[tuple[str, ...], Meta(min_length=1)]
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    tokens_per_second: Annotated[float, Meta(ge=0)] = 0.0
    max_running: Annotated[int, Meta(ge=0)] = 0
    page_share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_priority: Annotated[int, Meta(ge=-1000, le=1000)] = 1000


class TenantFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    tenants: dict[str, TenantEntry]


class Directory:
    """Who has which key. `tenants` are the limits by tenant; keys are kept as digests only."""

    def __init__(self, keys: tuple[str, ...], file: Path | None) -> None:
        # Keys of the configuration belong to the tenant that has no name.
        self._common = {_digest(key): "" for key in keys}
        self._keys = dict(self._common)
        self._file = file
        self._stamp: tuple[int, int] | None = None
        self._complaint = ""
        self.tenants: Mapping[str, Tenant] = {}
        if file is not None:
            self._read(file)

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask without a key."""
        return self._file is None and not self._common

    def knows(self, client: Client) -> bool:
        """Whether a client's key is (still) its tenant's, or none is needed."""
        return self.is_open or self._keys.get(client.key.encode()) == client.tenant

    @property
    def owners(self) -> dict[str, str]:
        """Whose is what belonged to a key, by its digest: see `owner_of`."""
        named = ((digest.decode(), tenant) for digest, tenant in self._keys.items() if tenant)
        return {digest: owner_of(tenant, digest) for digest, tenant in named}

    def tenant_of(self, key: str) -> str | None:
        """The tenant that a key belongs to; None if nobody has it."""
        given = _digest(key)
        found = None
        # Every key is compared, so that the time taken tells nothing.
        for known, tenant in self._keys.items():
            if hmac.compare_digest(known, given):
                found = tenant
        return found

    async def watch(self, changed: Callable[[Mapping[str, Tenant]], None]) -> None:
        """Read the file again whenever it changes. A file that is wrong changes nothing but the
        log."""
        if self._file is None:
            return
        while True:
            await anyio.sleep(RELOAD_SECONDS)
            try:
                if self._stamp == _stamp(self._file):
                    continue
                self._read(self._file)
            except (ConfigError, OSError) as error:
                if self._complaint != str(error):
                    self._complaint = str(error)
                    logger.error("tenants stay as they were: %s", error)
                continue
            self._complaint = ""
            logger.info("read %s: %d tenants", self._file.name, len(self.tenants))
            changed(self.tenants)

    def _read(self, file: Path) -> None:
        try:
            stamp = _stamp(file)
            text = file.read_text(encoding="utf-8")
            self._stamp = stamp  # of what was read, right or wrong
            entries = msgspec.convert(tomllib.loads(text), TenantFile).tenants
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error
        except msgspec.ValidationError as error:
            raise ConfigError(f"{file}: {error}") from error
        keys = dict(self._common)
        for name, entry in entries.items():
            for key in entry.keys:
                digest = _digest_of_entry(key)
                if digest is None:
                    raise ConfigError(
                        f"{file}: tenants.{name} has a key that is empty, or a digest that is not "
                        "64 hexadecimal digits"
                    )
                if keys.get(digest, name) != name:
                    raise ConfigError(f"{file}: tenants.{name} has a key that another tenant has")
                keys[digest] = name
        self._keys = keys
        self.tenants = {name: _tenant(name, entry) for name, entry in entries.items()}


def owner_of(tenant: str, digest: str) -> str:
    """Whose streams, files and answers are: the tenant's, whichever of its keys it shows; of those
    who have no name, nobody's but whoever has the key with this digest."""
    return f"tenant {tenant}" if tenant else digest


@dataclass(frozen=True)
class Client:
    """Who is asking, and what the connection says of when the answer is due."""

    tenant: str
    headers: Mapping[str, str]
    owner: str = ""
    """Of streams, files and stored answers, see `owner_of`; empty where no key is needed."""
    trace: str = ""
    key: str = ""
    """A digest of it."""


def client_of(connection: HTTPConnection) -> Client:
    """The client that the guard let in."""
    state = connection.state
    return Client(state.tenant, connection.headers, state.owner, state.trace, state.key)


def _tenant(name: str, entry: TenantEntry) -> Tenant:
    fields = msgspec.structs.asdict(entry)
    del fields["keys"]
    return Tenant(id=name, **fields)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).hexdigest().encode()


def _digest_of_entry(key: str) -> bytes | None:
    """A key of the file: as it is, or already a digest; None if it is neither."""
    if key.startswith(DIGEST):
        digest = key.removeprefix(DIGEST).strip().lower()
        return digest.encode() if re.fullmatch("[0-9a-f]{64}", digest) else None
    return _digest(key) if key.strip() else None


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
