"""A rank in a process of its own, which `crew.py` starts.

It loads its shard, then runs what the server sends until it is told to stop, or the server goes.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import selectors
import signal
import socket
import threading
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.errors import ConfigError
from engine.execution.filled import Filled, Queued
from engine.execution.messages import (
    PULSE_SECONDS,
    Alive,
    Allocate,
    Channel,
    Done,
    Failed,
    FromRank,
    Loaded,
    Loading,
    Log,
    Ready,
    Setup,
    Step,
    Stop,
    ToRank,
    encode,
    to_rank,
)
from engine.execution.mirror import PlanReader
from engine.execution.rank import Rank
from engine.execution.runner import Runner
from engine.execution.stepper import Stepper, stepper_for
from engine.execution.tokenizer import open_tokenizer
from engine.scheduling.plan import Plan, StepResult
from engine.text.grammar import GrammarCompiler
from engine.weights.checkpoint import open_checkpoint
from kernels.collectives import GIVEN_UP, Place

PR_SET_PDEATHSIG = 1
logger = logging.getLogger("ryzanstein.engine")


class Server:
    """The server, as its rank sees it; waits where it has to."""

    def __init__(self, connection: socket.socket) -> None:
        self.channel = Channel(connection)
        self._messages: deque[ToRank] = deque()

    def tell(self, message: FromRank) -> None:
        """Send, however long it takes."""
        sent = self.channel.send(encode(message))
        while not sent:
            select.select([], [self.channel], [])
            sent = self.channel.flush()

    def ask(self) -> ToRank:
        """The next message. Raises EOFError if the server is gone."""
        while not self._messages:
            select.select([self.channel], [], [])
            self.read()
        return self._messages.popleft()

    def read(self) -> deque[ToRank]:
        """All messages that have arrived."""
        self._messages.extend(to_rank(body) for body in self.channel.receive())
        return self._messages


class Relay(logging.Handler):
    """Sends what is logged here to the server's log."""

    def __init__(self, server: Server, level: int) -> None:
        super().__init__(level)
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        self._server.tell(Log(record.levelno, record.name, self.format(record)))


class Pulse:
    """Says now and then that this process lives, while something goes on that may take long."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(PULSE_SECONDS):
            self._server.tell(Alive())


class Reporter:
    """A runner whose results go to the server from the thread that got them: on busy cores it could
    take milliseconds until another thread's turn comes."""

    def __init__(self, server: Server, runner: Runner, *, first: bool) -> None:
        self._server = server
        self._runner = runner
        self._first = first
        self._numbers: deque[int] = deque()

    @property
    def runs_behind(self) -> bool:
        return self._runner.runs_behind

    def fill(self, plan: Plan) -> Filled | Queued:
        self._numbers.append(plan.step)
        return self._runner.fill(plan)

    def rest(self) -> bool:
        return self._runner.rest()

    def run(self, filled: Filled | Queued) -> StepResult:
        return self._report(self._runner.run(filled))

    def needs_history(self, filled: Filled | Queued) -> bool:
        return self._runner.needs_history(filled)

    def launch(self, filled: Filled | Queued) -> Callable[[], StepResult]:
        collect = self._runner.launch(filled)
        return lambda: self._report(collect())

    def close(self) -> None:
        self._runner.close()

    def _report(self, result: StepResult) -> StepResult:
        """Tell the tokens' checksum and, if this is the first rank, everything."""
        checksum = zlib.crc32(np.array(result.ids, np.int64).tobytes())
        done = Done(self._numbers.popleft(), checksum)
        if self._first:
            done.ids, done.logprobs = result.ids, result.logprobs
            done.top, done.seconds, done.faults = result.top, result.seconds, result.faults
        self._server.tell(done)
        return result


def work(server: Server, stepper: Stepper) -> None:
    """Run steps until told to stop. Raises what a step raises, and EOFError if the server goes."""
    plans = PlanReader()
    with selectors.DefaultSelector() as selector:
        selector.register(server.channel, selectors.EVENT_READ)
        selector.register(stepper.fileno(), selectors.EVENT_READ)
        while True:
            selector.select()
            while stepper.ready():
                stepper.result()
            messages = server.read()
            while messages:
                message = messages.popleft()
                if isinstance(message, Stop):
                    return
                assert isinstance(message, Step)
                stepper.submit(plans.read(message))


def run(server: Server) -> None:
    """Load, then work. Raises what goes wrong."""
    setup = server.ask()
    assert isinstance(setup, Setup)
    level = logging.INFO if setup.rank == 0 else logging.WARNING
    logging.basicConfig(
        handlers=[Relay(server, level)], level=level, format="%(message)s", force=True
    )
    place = Place(setup.rank, setup.ranks, setup.memory)
    checkpoint = open_checkpoint(Path(setup.path), texts=False)
    with Pulse(server):
        rank = Rank(
            setup.config, checkpoint, place, lambda done, total: server.tell(Loading(done, total))
        )
        server.tell(Loaded(rank.facts))
        allocate = server.ask()
        if isinstance(allocate, Stop):
            return
        assert isinstance(allocate, Allocate)
        compiler = GrammarCompiler(
            lambda: open_tokenizer(open_checkpoint(Path(setup.path))), rank.facts.vocab_size
        )
        runner = rank.allocate(allocate.size, compiler)
    # A later collection that looked at all of it would hold up every rank.
    gc.collect()
    gc.freeze()
    server.tell(Ready(runner.buffer_bytes()))
    try:
        work(server, stepper_for(Reporter(server, runner, first=setup.rank == 0)))
    except BaseException:
        rank.abort()
        raise


def main(parent: int) -> None:
    """What the process does, on its standard input; its exit status says nothing, its last message
    does. `parent` is the server's process."""
    # A rank does not outlive its server, however that ends.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    server = Server(socket.socket(fileno=0))
    try:
        run(server)
    except EOFError:
        pass  # nobody is left to tell
    except ConfigError as error:
        server.tell(Failed(str(error), refused=True))
    except BaseException as error:
        follows = str(error) == GIVEN_UP
        if not follows:
            logger.error("it failed", exc_info=error)
        server.tell(Failed(f"{type(error).__name__}: {error}", follows=follows))
    # Not waiting for threads: one may be in a step that never ends.
    os._exit(0)
