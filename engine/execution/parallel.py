"""Many ranks as one `Stepper`: starts their processes, watches them, and starts them again.

Every rank is a process, so that none can take the server with it. A thread of the server's sends
them steps and collects their answers. A rank that dies, says that it failed, or does not answer in
time takes all with it: they are killed at once, one `DeviceLost` says so, and others are started.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import Config
from engine.errors import ConfigError, DeviceLost, EngineFailed
from engine.execution.bell import Bell
from engine.execution.crew import Crew, RankLost
from engine.execution.memory import CacheSize
from engine.execution.messages import (
    PULSE_SECONDS,
    Allocate,
    Done,
    Loaded,
    Loading,
    Log,
    Ready,
    encode,
)
from engine.execution.mirror import PlanWriter
from engine.execution.rank import RankFacts
from engine.execution.stepper import CLOSE_SECONDS
from engine.scheduling.plan import Plan, StepResult

logger = logging.getLogger("ryzanstein.engine")

# Losses in a row, without a step between them, after which nothing is started any more.
MAX_LOSSES = 3
# A step hangs that takes longer than this, and than so many times almost all steps before it.
LEAST_SECONDS, TIMES_USUAL = 1.0, 10.0
# The least that a crew's first step has: it touches all of its memory for the first time.
FIRST_SECONDS = 5.0
# Steps that are remembered, and how often the usual time is found anew.
REMEMBERED, EVERY = 512, 64
# Starting ranks say that they live; one that is silent for so long hangs.
SILENT_SECONDS = 60.0
# A step of which nobody knows what it should take.
UNKNOWN_SECONDS = 300.0
# What a page that is moved may take, from a slow disk.
MOVE_SECONDS = 0.02
# A turn of the watch that takes so much longer than it should was a pause of this process, and of
# the ranks with it.
PAUSE_SECONDS = 0.2
# Pauses before ranks are started again that were lost without having run a step.
BACKOFF_SECONDS = (0.0, 2.0)


class Pace:
    """How long steps usually take, and so when one hangs."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._count = 0
        self._usual = 0.0

    def observe(self, seconds: float) -> None:
        """A step has taken so long."""
        self._seconds.append(seconds)
        if self._count % EVERY == 0 or seconds > self._usual:
            self._usual = sorted(self._seconds)[int(0.99 * (len(self._seconds) - 1))]
        self._count += 1

    def limit(self, predicted: float, *, first: bool = False) -> float:
        """Seconds after which a step hangs, its ranks' `first` or not, that should take
        `predicted`; 0 if nobody knows, as of those that measure the machine, which have long."""
        if not predicted:
            return UNKNOWN_SECONDS
        least = FIRST_SECONDS if first else LEAST_SECONDS
        return max(least, TIMES_USUAL * max(self._usual, predicted))


@dataclass
class Flight:
    """A step under way: since when, how long it should take, and which ranks have finished it."""

    number: int
    begun: float
    predicted: float
    done: dict[int, Done] = field(default_factory=dict)


class RankStepper:
    """Runs plans on `ranks` processes. `choose` says how large the cache is, given what the ranks
    are. Raises ConfigError if they cannot be started."""

    def __init__(
        self,
        config: Config,
        path: str,
        choose: Callable[[Sequence[RankFacts]], CacheSize],
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        self._config = config
        self._path = path
        self._choose = choose
        self._progress = progress
        self.size = CacheSize(0)
        """That of the cache."""
        self.facts: list[RankFacts] = []
        self.buffers = 0
        """Bytes of all ranks' activations."""
        self.losses = 0
        self.pids: list[int] = []
        """Processes of the ranks, first rank first."""
        self._pace = Pace()
        self._writer = PlanWriter()
        self._lock = threading.Lock()
        self._crew: Crew | None = None
        self._flights: deque[Flight] = deque()
        self._outcomes: deque[StepResult | DeviceLost] = deque()
        self._lost = False
        self._steps = 0
        self._closing = False
        self._bell = Bell()
        self._wake_read, self._wake_write = os.pipe()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._supervise, args=(started,), name="ryzanstein-ranks", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self.close()
            raise

    @property
    def available(self) -> bool:
        return self._crew is not None and not self._lost

    @property
    def lead(self) -> float:
        return 0.005  # on busy cores a message may take that long to be heard

    def submit(self, plan: Plan) -> None:
        data = encode(self._writer.write(plan))
        with self._lock:
            if self._lost:
                return  # it goes with those before it
            if self._crew is None:
                raise EngineFailed("the model's ranks are being started")
            expected = plan.predicted + MOVE_SECONDS * len(plan.moves)
            self._flights.append(Flight(plan.step, time.monotonic(), expected))
            sent = self._crew.send(data)
            # Whoever watched nothing has a deadline to watch now.
            if not sent or len(self._flights) == 1:
                self._wake()

    def ready(self) -> bool:
        self._bell.settle()
        return bool(self._outcomes)

    def result(self) -> StepResult:
        with self._lock:
            outcome = self._outcomes.popleft()
            self._bell.answered()
            if isinstance(outcome, StepResult):
                return outcome
            self._writer, self._lost = PlanWriter(), False
        raise outcome

    def run(self, plan: Plan) -> StepResult:
        """Submit a plan and wait for its result."""
        self.submit(plan)
        poll = select.poll()
        poll.register(self._bell.reading, select.POLLIN)
        while not self.ready():
            poll.poll()
        return self.result()

    def fileno(self) -> int:
        return self._bell.reading

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise EngineFailed("the thread that watches the ranks hangs; it was left behind")
        self._bell.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        os.write(self._wake_write, b"\0")

    def _supervise(self, started: Future[None]) -> None:
        """Keep ranks running until closed, or until it is no use."""
        in_a_row = 0
        while not self._closing:
            self._steps = 0
            crew = None
            try:
                crew = Crew(self._config, self._path, self._wake_read)
                self._start(crew)
                if not started.done():
                    started.set_result(None)
                self._serve(crew)
            except BaseException as error:  # noqa: BLE001  (whoever waits gets it, or the log)
                if crew is not None:
                    crew.kill()
                if not started.done():
                    started.set_exception(_refusal(error))
                    return
                in_a_row = 1 if self._steps else in_a_row + 1
                self._lose(error, final=in_a_row >= MAX_LOSSES)
                if in_a_row >= MAX_LOSSES:
                    return
                self._pause(BACKOFF_SECONDS[in_a_row - 1])
            else:
                crew.stop()

    def _pause(self, seconds: float) -> None:
        """Wait, unless woken."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.poll(1e3 * seconds)

    def _start(self, crew: Crew) -> None:
        """Bring all ranks to where they run steps. Raises RankLost, or ConfigError."""
        loaded: dict[int, RankFacts] = {}
        ready: dict[int, int] = {}
        sized = False
        while len(ready) < crew.ranks and not self._closing:
            messages = crew.receive(PULSE_SECONDS)
            for rank, heard in enumerate(crew.heard):
                # Those that are ready have nothing more to say.
                if rank not in ready and time.monotonic() - heard > SILENT_SECONDS:
                    raise RankLost(f"rank {rank} said nothing for {SILENT_SECONDS:.0f} s")
            for rank, message in messages or ():
                if isinstance(message, Loading) and rank == 0 and not self.size.pages:
                    self._progress(message.done, message.total)
                elif isinstance(message, Loaded):
                    loaded[rank] = message.facts
                elif isinstance(message, Ready):
                    ready[rank] = message.buffers
            if len(loaded) == crew.ranks and not sized:
                facts = [loaded[rank] for rank in range(crew.ranks)]
                if self.facts and [f.identity for f in facts] != [f.identity for f in self.facts]:
                    raise ConfigError("the model's files have changed; restart the server")
                self.facts = facts
                # Those that take others' places have the cache that they had.
                if not self.size.pages:
                    self.size = self._choose(self.facts)
                crew.send(encode(Allocate(self.size)))
                sized = True
        self.buffers = sum(ready.values())
        crew.started = True
        with self._lock:
            self.pids = crew.pids
            self._crew = crew

    def _serve(self, crew: Crew) -> None:
        """Collect results until closed. Raises RankLost.

        A step's time counts from when this thread first saw that it is the oldest, and only while
        this thread gets its turns: what stops everything is no hang.
        """
        turn = time.monotonic()
        watched, since = None, turn
        while not self._closing:
            with self._lock:
                oldest = self._flights[0] if self._flights else None
            if oldest is not watched:
                watched, since = oldest, turn
            wait = None
            if oldest is not None:
                limit = self._pace.limit(oldest.predicted, first=not self._steps)
                left = since + limit - turn
                if left <= 0:
                    raise RankLost(f"a step hangs: it took more than {limit:.1f} s")
                # In slices, so that a pause shows.
                wait = min(left, PAUSE_SECONDS)
            messages = crew.receive(wait)
            before, turn = turn, time.monotonic()
            if wait is not None and turn - before - wait > PAUSE_SECONDS:
                since += turn - before - wait
            for rank, message in messages or ():
                assert isinstance(message, Done | Log), "a rank that runs has nothing else to say"
                if isinstance(message, Done):
                    self._take(rank, message)

    def _take(self, rank: int, done: Done) -> None:
        """Note that a rank has finished a step; when all have, it has a result."""
        now = time.monotonic()
        with self._lock:
            flight = next(f for f in self._flights if rank not in f.done)
            assert flight.number == done.number, "ranks run steps in order"
            flight.done[rank] = done
            if len(flight.done) < self._config.execution.tensor_parallel:
                return
            self._flights.popleft()
            if self._flights:
                self._flights[0].begun = now
        if len({each.checksum for each in flight.done.values()}) > 1:
            raise RankLost(f"ranks drew different tokens in step {flight.number}")
        if flight.predicted:
            self._pace.observe(now - flight.begun)
        self._steps += 1
        first = flight.done[0]
        self._put(StepResult(first.ids, first.logprobs, first.top, first.seconds, first.faults))

    def _lose(self, error: BaseException, *, final: bool) -> None:
        """Everything under way is lost."""
        expected = isinstance(error, RankLost | ConfigError)
        logger.error("the ranks are lost: %s", error, exc_info=None if expected else error)
        with self._lock:
            running, self._crew, self.pids = self._crew is not None, None, []
            self._flights.clear()
            # One that has not been heard of yet says it for both.
            running = running and not self._lost
            self._lost = self._lost or running
            self.losses += 1
        if final:
            message = f"{MAX_LOSSES} times in a row the ranks were lost: {error}"
            self._put(DeviceLost(message, final=True))
        elif running:
            message = "a rank of the model was lost, and with it the answer; try again"
            self._put(DeviceLost(message))

    def _put(self, outcome: StepResult | DeviceLost) -> None:
        self._outcomes.append(outcome)
        self._bell.ring()


def _refusal(error: BaseException) -> BaseException:
    """What is raised to whoever wanted ranks that could not be started."""
    return ConfigError(f"cannot start the ranks: {error}") if isinstance(error, RankLost) else error
