"""What the server and its ranks tell each other: msgspec structs over a stream socket."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import msgspec

from engine.config import Config
from engine.execution.memory import CacheSize
from engine.execution.rank import RankFacts
from engine.scheduling.plan import Move
from engine.types import SamplingParams

LENGTH = struct.Struct("<I")
READ_BYTES = 1 << 18
# How often a rank that starts says that it lives.
PULSE_SECONDS = 5.0


class Setup(msgspec.Struct, tag=True):
    """To a rank: who it is and what it loads; `memory` is the descriptor by which all meet."""

    config: Config
    path: str
    rank: int
    ranks: int
    memory: int


class Allocate(msgspec.Struct, tag=True):
    """To a rank: make a cache of this size."""

    size: CacheSize


class Entered(msgspec.Struct, array_like=True):
    """A sequence that entered a slot, with its tokens so far."""

    slot: int
    seed: int
    tokens: list[int]
    prompt_length: int
    sampling: SamplingParams
    ends: frozenset[int]


class Part(msgspec.Struct, array_like=True):
    """A chunk, see `plan.Chunk`."""

    slot: int
    start: int
    count: int
    rows: int
    sample: bool
    write: bool
    given: tuple[int, ...]


class Step(msgspec.Struct, tag=True):
    """To a rank: a step, and what has changed since the last: who entered, (slot, pages, what lies
    beside them) that were added. `decodes` are (slot, positions scheduled), `kept` (slot, pages,
    place) of states."""

    number: int
    entered: list[Entered]
    pages: list[tuple[int, list[int], list[int]]]
    decodes: list[tuple[int, int]]
    parts: list[Part]
    moves: list[tuple[Move, int, int]]
    busy: bool = False
    kept: list[tuple[int, int, int]] = []


class Stop(msgspec.Struct, tag=True):
    """To a rank: end."""


class Loading(msgspec.Struct, tag=True):
    """From a rank: tensors that it has read."""

    done: int
    total: int


class Alive(msgspec.Struct, tag=True):
    """From a rank that starts: it is still there."""


class Loaded(msgspec.Struct, tag=True):
    """From a rank: its weights are in place."""

    facts: RankFacts


class Ready(msgspec.Struct, tag=True):
    """From a rank: it runs steps; its buffers take so many bytes."""

    buffers: int


class Done(msgspec.Struct, tag=True):
    """From a rank: a step has ended. The tokens' checksum comes from all ranks, the tokens from the
    first."""

    number: int
    checksum: int
    ids: list[int] = []
    logprobs: list[float | None] = []
    top: list[list[tuple[int, float]]] = []
    seconds: dict[str, float] = {}
    faults: dict[int, str] = {}


class Failed(msgspec.Struct, tag=True):
    """From a rank: it cannot go on. `refused` says that the configuration or a file is to blame,
    `follows` that another rank is."""

    reason: str
    refused: bool = False
    follows: bool = False


class Log(msgspec.Struct, tag=True):
    """From a rank: a line for the log."""

    level: int
    name: str
    text: str


ToRank = Setup | Allocate | Step | Stop
FromRank = Alive | Loading | Loaded | Ready | Done | Failed | Log
_encoder = msgspec.msgpack.Encoder()
_of_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)


def encode(message: ToRank | FromRank) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def to_rank(body: bytes) -> ToRank:
    """Read a message to a rank."""
    return _to_rank.decode(body)


def from_rank(body: bytes) -> FromRank:
    """Read a message from a rank."""
    return _of_rank.decode(body)


class Channel:
    """One end of a socket. Any thread may send; what does not go out at once waits for `flush`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """To wait on."""
        return self._connection.fileno()

    def send(self, data: bytes) -> bool:
        """Send as much as can be sent without waiting; whether that was all."""
        with self._lock:
            self._outgoing += data
            return self._flush()

    def flush(self) -> bool:
        """Send more of what waits; whether nothing is left."""
        with self._lock:
            return self._flush()

    def receive(self) -> Iterator[bytes]:
        """The messages that have arrived. Raises EOFError if the other end is gone."""
        try:
            data = self._connection.recv(READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self._incoming += data
        while len(self._incoming) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._incoming)
            if len(self._incoming) < LENGTH.size + size:
                return
            body = bytes(self._incoming[LENGTH.size : LENGTH.size + size])
            del self._incoming[: LENGTH.size + size]
            yield body

    def close(self) -> None:
        """Close this end."""
        with self._lock:
            self._connection.close()

    def _flush(self) -> bool:
        while self._outgoing:
            try:
                sent = self._connection.send(self._outgoing)
            except BlockingIOError:
                return False
            except OSError:
                # The other end is gone, which whoever reads will learn.
                self._outgoing.clear()
                return True
            del self._outgoing[:sent]
        return True
