"""The processes of all ranks of one model: started, talked to, ended. Nothing outlives them: they
meet in memory without a name, and speak over socket pairs."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from engine.config import Config, ServerSection
from engine.errors import ConfigError
from engine.execution.messages import (
    Channel,
    Failed,
    FromRank,
    Log,
    Setup,
    Stop,
    encode,
    from_rank,
)
from kernels.collectives import shared_memory

logger = logging.getLogger("ryzanstein.engine")

# What a rank that was told to stop, or that is gone, has left to end.
STOP_SECONDS = 2.0
# How long the first failure may come behind those that follow from it.
CAUSE_SECONDS = 0.1
ROOT = Path(__file__).parents[2]
# What a rank's process runs. It is the server's to say when to stop, not a terminal's or a service
# manager's, which signal all processes; and that from the first moment on.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path.append(sys.argv[1])
from engine.execution.rank_process import main
main(int(sys.argv[2]))
"""


class RankLost(Exception):
    """A rank cannot go on, and so none can."""


class Crew:
    """Starts a process for each rank. `wake` is a descriptor that ends a wait."""

    def __init__(self, config: Config, path: str, wake: int) -> None:
        self.ranks = config.execution.tensor_parallel
        self._wake = wake
        self.started = False
        self.heard = [time.monotonic()] * self.ranks
        """When each rank last said something."""
        self._said: set[str] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        # Keys and addresses are no business of theirs.
        shared = msgspec.structs.replace(config, server=ServerSection())
        self._memory = shared_memory()
        self._selector = selectors.DefaultSelector()
        try:
            self._selector.register(wake, selectors.EVENT_READ, None)
            for rank in range(self.ranks):
                self._spawn(rank)
                setup = Setup(shared, path, rank, self.ranks, self._memory)
                self._channels[rank].send(encode(setup))
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes, first rank first."""
        return [process.pid for process in self._processes]

    def send(self, data: bytes) -> bool:
        """Send a message to all; False if some of it waits until `receive` sends it."""
        sent = [channel.send(data) for channel in self._channels]
        return all(sent)

    def receive(self, timeout: float | None) -> list[tuple[int, FromRank]] | None:
        """What ranks say, with their numbers; empty if woken, None if nobody says anything for
        `timeout` seconds. Raises RankLost if one is gone or gives up, ConfigError if it was given
        something that cannot be."""
        messages = self._receive(timeout)
        if messages is None:
            return None
        failed = [(rank, m) for rank, m in messages if isinstance(m, Failed)]
        if failed and all(message.follows for _, message in failed):
            # The one that failed first has something to say, too.
            more = self._receive(CAUSE_SECONDS) or []
            failed += [(rank, m) for rank, m in more if isinstance(m, Failed)]
            self._log(more)
        self._log(messages)
        for rank, message in sorted(failed, key=lambda f: f[1].follows):
            if message.refused:
                raise ConfigError(message.reason)
            raise RankLost(f"rank {rank} failed: {message.reason}")
        return messages

    def stop(self) -> None:
        """End the processes, which may finish what they do."""
        self.send(encode(Stop()))
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """End the processes now, stopped ones included, and release everything."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for channel in self._channels:
            channel.close()
        self._selector.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _spawn(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k != "RYZANSTEIN_API_KEY"}
        # The ranks of one machine speak to nobody else.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, "lo")
        with theirs:
            # `-P`: nothing is imported from whatever folder this is.
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN, str(ROOT), str(os.getpid())],
                pass_fds=(self._memory,),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        self._processes.append(process)
        channel = Channel(ours)
        self._channels.append(channel)
        self._selector.register(channel, selectors.EVENT_READ, rank)

    def _flush(self) -> None:
        """Send what waits, and see that the next wait ends when more can be sent."""
        for rank, channel in enumerate(self._channels):
            write = 0 if channel.flush() else selectors.EVENT_WRITE
            self._selector.modify(channel, selectors.EVENT_READ | write, rank)

    def _receive(self, timeout: float | None) -> list[tuple[int, FromRank]] | None:
        events = self._selector.select(timeout)
        messages: list[tuple[int, FromRank]] = []
        for key, _ in events:
            if key.data is None:
                os.read(self._wake, 4096)
                continue
            rank = key.data
            self.heard[rank] = time.monotonic()
            try:
                messages += [(rank, from_rank(body)) for body in self._channels[rank].receive()]
            except EOFError:
                messages.append((rank, Failed(self._epitaph(rank))))
        self._flush()
        return messages if events else None

    def _log(self, messages: list[tuple[int, FromRank]]) -> None:
        """Log what ranks log; while they start, what all of them say is logged once."""
        for rank, message in messages:
            if isinstance(message, Log) and message.text not in self._said:
                if not self.started:
                    self._said.add(message.text)
                name = logging.getLogger(message.name)
                name.log(message.level, "rank %d: %s", rank, message.text)

    def _epitaph(self, rank: int) -> str:
        process = self._processes[rank]
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"it was ended by signal {-status}" if status < 0 else f"it exited with {status}"
