"""One episode: a random house, random guests, and everything that must hold after every step."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import anyio

from engine.config import PolicyName
from engine.engine import AsyncEngine
from engine.errors import DeadlineExceeded, EngineFailed, InvalidRequest, Overloaded
from engine.parts import Parts
from engine.scheduling.admission import Limits
from engine.scheduling.budget import Pace
from engine.scheduling.cost import Profile
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculate import Speculator
from engine.scheduling.tenants import INPUT_WEIGHT, OUTPUT_WEIGHT, Tenant
from engine.scheduling.window_pages import WindowPages, least_window_pages
from engine.streams import TokenStream
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from engine.types import RequestStats, SamplingParams, StepStats, Terms
from tests.audit import audit
from tests.mock import VOCAB, mock_scheduler
from tests.simulation.clock import VirtualLoop
from tests.simulation.model import FakeStepper, expected

# Virtual seconds within which everybody has to be served once nobody comes any more.
PATIENCE = 3600.0
# In houses of so many tenants the model keeps states.
RECURRENT = 2
PROFILE = Profile((1, 1001), (0.0024, 0.4024), 0.0, 0.0, 0.0)
POLICIES: list[PolicyName] = ["lru", "lfu", "sieve", "cost", "adaptive"]


@dataclass
class World:
    """What one episode is made of, all drawn from its seed."""

    chance: random.Random
    pages: int = 0
    context: int = 0
    running: int = 0
    tenants: dict[str, Tenant] = field(default_factory=dict)
    capped: bool = False
    failures: float = 0.0
    losses: float = 0.0
    # Places for states, if the model keeps some.
    snapshots: int | None = None
    # What some layers see, if they see a window; with how few window pages more than are needed.
    window: int = 0
    spare_windows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        chance = self.chance
        self.pages = chance.choice([12, 20, 40])
        # Of the larger ones, a prompt may take over one half.
        self.page_size = chance.choice([4, 4, 8])
        self.context = min(self.pages * self.page_size, chance.choice([40, 60]))
        self.running = chance.choice([2, 4, 8])
        self.capped = chance.random() < 0.3
        self.failures = chance.choice([0.0, 0.0, 0.002])
        self.losses = chance.choice([0.0, 0.0, 0.0, 0.2])
        for name in "abc"[: chance.randint(1, 3)]:
            self.tenants[name] = Tenant(
                id=name,
                weight=chance.choice([1.0, 1.0, 3.0]),
                max_running=chance.choice([0, 1, 3]) if self.capped else 0,
                page_share=chance.choice([1.0, 0.7]) if self.capped else 1.0,
            )
        if len(self.tenants) == RECURRENT:
            self.snapshots = chance.choice([0, 1, 3, 8])
        elif chance.random() < 0.6:
            self.window = chance.choice([1, 2, 5, 8, 13])
            self.spare_windows = chance.choice([0, 1, 4, 12])
        # Beginnings that many prompts share.
        self.beginnings = [
            [chance.randrange(97) for _ in range(chance.choice([3, 8, 13, 20]))] for _ in range(4)
        ]

    def engine(self, loop: VirtualLoop, tokenizer: Tokenizer) -> AsyncEngine:
        """The real engine around the fake model."""
        chance = self.chance

        def parts() -> Parts:
            step_tokens = self.running + self.page_size + chance.choice([0, 4, 20])
            windows = None
            if self.window:
                few = (
                    least_window_pages(self.window, step_tokens, self.page_size)
                    + self.spare_windows
                )
                sizes = (min(few, self.pages), self.window, self.page_size, self.pages, step_tokens)
                windows = WindowPages(*sizes)
            scheduler = mock_scheduler(
                self.pages,
                self.page_size,
                loop,
                step_tokens=step_tokens,
                running=self.running,
                cold_slots=chance.choice([0, 0, 10]),
                eviction=chance.choice(POLICIES),
                profile=PROFILE,
                pace=Pace(chance.choice([0.0, 0.004, 0.02])),
                max_prefilling=chance.choice([1, 3, 8]),
                prefix_caching=chance.random() < 0.85,
                lease=chance.choice([0.0, 0.5, 120.0]),
                speculative_tokens=chance.choice([0, 1, 5]) * (self.snapshots is None),
                snapshots=self.snapshots,
                windows=windows,
            )
            guesser = Guesser(scheduler.cost, self.page_size, scheduler.limits)
            guesser.rows = scheduler.limits.max_batch_tokens
            guesser.chance = chance
            scheduler.speculator = scheduler._committer._speculator = guesser
            if chance.random() < 0.5:
                for _ in range(20):
                    scheduler.lengths.record(chance.randint(1, 6))  # too few: let too many in
            return Parts(
                model_name="simulated",
                tokenizer=tokenizer,
                vocab_size=VOCAB,
                scheduler=scheduler,
                stepper=FakeStepper(
                    loop,
                    chance,
                    self.pages,
                    self.page_size,
                    self.failures,
                    recurrent=self.snapshots is not None,
                    windows=windows,
                ),
                limits=Limits(self.context, 60, 1500),
                fingerprint=b"simulated",
                compiler=GrammarCompiler(lambda: tokenizer, VOCAB),
                clock=loop,
            )

        look_ahead = chance.random() < 0.7
        engine = AsyncEngine(parts, seeds=lambda: 1, stall_seconds=1e9, look_ahead=look_ahead)
        engine.configure_tenants(self.tenants)
        return engine


class Guesser(Speculator):
    """Knows the model, and is wrong from some place on; sometimes it waits, sometimes not."""

    chance: random.Random
    rows: int

    def guesses(self, decoding: List[Sequence]) -> dict[Sequence, tuple[int, ...]] | None:
        found: dict[Sequence, tuple[int, ...]] = {}
        rows = self.rows - len(decoding)
        for sequence in decoding if self.most else ():
            room = min(self.most, rows, sequence.final_length - len(sequence.tokens) - 1)
            if room < 1 or self.chance.random() < 0.5:
                continue
            if sequence.scheduled >= len(sequence.tokens):
                return None
            guess = expected(sequence.tokens, self.chance.randint(1, room))
            rows -= len(guess)
            wrong = self.chance.randrange(2 * len(guess))
            found[sequence] = tuple(t + (n == wrong) for n, t in enumerate(guess))
        return found


class Watcher:
    """A listener that checks every invariant after every step."""

    def __init__(self, engine: AsyncEngine, world: World) -> None:
        self._engine = engine
        self._world = world
        self.steps = 0
        self.failure: AssertionError | None = None

    def on_step(self, stats: StepStats) -> None:
        self.steps += 1
        if self.failure is None:
            try:
                scheduler = self._engine.parts.scheduler
                audit(scheduler)
                pool = scheduler.pool
                for plan in scheduler.in_flight:
                    rows = len(plan.decodes) + sum(chunk.count for chunk in plan.chunks)
                    assert rows <= scheduler.limits.max_batch_tokens, "a step is too large"
                assert pool.used + pool.free == pool.available, "a page is lost"
                if not self._world.capped:
                    self._check_fairness()
            except AssertionError as error:
                self.failure = error

    def on_request(self, stats: RequestStats) -> None:
        pass

    def _check_fairness(self) -> None:
        """VTC, lemma 4.3: the counters of the backlogged stay within what can be under way."""
        world = self._world
        accounts = self._engine.parts.scheduler.queue.accounts.values()
        waiting = [a for a in accounts if a.waiting]
        if len(waiting) > 1:
            counters = [a.counter for a in waiting]
            # A sequence's last token is served, but never lies in the cache.
            held = world.pages * world.page_size + world.running
            most = max(INPUT_WEIGHT * world.context, OUTPUT_WEIGHT * held)
            bound = most / min(a.tenant.weight for a in waiting)
            gap = max(counters) - min(counters)
            assert gap <= bound, f"service differs by {gap}, the bound is {bound}"


class Guests:
    """Clients that come at random, read at their own pace, and check what they get."""

    def __init__(self, engine: AsyncEngine, world: World, loop: VirtualLoop) -> None:
        self._engine = engine
        self._world = world
        self._loop = loop
        self._number = itertools.count()
        self.open = True
        self.failure: AssertionError | None = None

    async def keep_coming(self, group: Any) -> None:
        """Start clients, in calm times and in crowds, until the house is closed."""
        chance = self._world.chance
        while self.open:
            calm = chance.random() < 0.9
            await anyio.sleep(chance.expovariate(20 if calm else 1))
            for _ in range(1 if calm else chance.randint(3, 15)):
                group.start_soon(self._one)

    async def squeeze(self) -> None:
        """Memory that comes and goes: the pool is made smaller and larger while it serves."""
        pool, chance = self._engine.parts.scheduler.pool, self._world.chance
        least = -(-self._world.context // self._world.page_size)
        while self.open:
            await anyio.sleep(chance.expovariate(2))
            self._engine.parts.scheduler.resize(chance.randint(least, pool.total))
        self._engine.parts.scheduler.resize(pool.total)

    async def rob(self) -> None:
        """Take the device away now and then, with everything on it."""
        stepper = self._engine.parts.stepper
        assert isinstance(stepper, FakeStepper)
        while self.open and self._world.losses:
            await anyio.sleep(self._world.chance.expovariate(self._world.losses))
            stepper.lose()

    async def _one(self) -> None:
        try:
            outcome = await self._ask()
        except (Overloaded, DeadlineExceeded, EngineFailed, InvalidRequest) as error:
            outcome = type(error).__name__
        except AssertionError as error:
            self.failure = error
            outcome = "wrong"
        self._world.outcomes[outcome] += 1

    async def _ask(self) -> str:
        world, chance = self._world, self._world.chance
        prompt = list(chance.choice(world.beginnings))
        prompt += [chance.randrange(97) for _ in range(chance.choice([0, 0, 1, 2, 5, 9]))]
        n = chance.choice([1, 1, 1, 2, 4])
        count = chance.randint(1, max(1, min(18, world.context - len(prompt))))
        scored = chance.random() < 0.05
        params = SamplingParams(
            max_tokens=count, n=n, ignore_eos=True, prompt_logprobs=0 if scored else None
        )
        tenant = chance.choice([*world.tenants])
        deadline = chance.choice([None, None, None, 0.2, 2.0])
        terms = Terms(
            tenant=tenant,
            namespace=tenant.encode(),
            priority=chance.choice([0, 0, 0, -1, 2]),
            lease=chance.choice(["", "", "x", "y"]),
            **({} if deadline is None else {"deadline": deadline}),
        )
        if chance.random() < 0.1:
            self._engine.end_lease("x")
        begun = self._loop.time()
        stream = await self._engine.submit(
            prompt, params, terms=terms, request_id=f"r{next(self._number)}"
        )
        aborts = chance.randint(0, count * n) if chance.random() < 0.15 else None
        slow = chance.random() < 0.1
        try:
            return await self._read(stream, expected(prompt, count), n, aborts, slow=slow)
        except DeadlineExceeded:
            assert deadline is not None, "a deadline that nobody set"
            assert self._loop.time() >= begun + deadline, "too early for the deadline"
            raise
        except EngineFailed:
            assert world.failures or world.losses, "the engine failed by itself"
            raise

    async def _read(
        self, stream: TokenStream, wanted: list[int], n: int, aborts: int | None, *, slow: bool
    ) -> str:
        """Collect every choice's tokens; they are the model's, each once, in order."""
        got: dict[int, list[int]] = {index: [] for index in range(n)}
        reasons: dict[int, str] = {}
        while deltas := await stream.receive():
            for delta in deltas:
                got[delta.index] += delta.token_ids
                assert got[delta.index] == wanted[: len(got[delta.index])], "another's token"
                assert delta.index not in reasons, "a choice goes on after its end"
                if delta.finish_reason is not None:
                    reasons[delta.index] = delta.finish_reason
            if aborts is not None and sum(map(len, got.values())) >= aborts:
                self._engine.abort(*stream.request_ids)
                aborts = None
            if slow:
                self._engine.pause(*stream.request_ids)
                await anyio.sleep(self._world.chance.expovariate(10))
                self._engine.unpause(*stream.request_ids)
        assert len(reasons) == n, "a choice has no end"
        for index, reason in reasons.items():
            if reason == "length":
                assert got[index] == wanted, "tokens are missing"
            else:
                assert reason == "abort"
        return "served"


async def live(loop: VirtualLoop, world: World, tokenizer: Tokenizer, steps: int) -> int:
    """Run an episode of about `steps` steps; returns how many it were. Raises AssertionError."""
    logging.getLogger("ryzanstein").setLevel(logging.CRITICAL)  # failures are part of the plan
    engine = world.engine(loop, tokenizer)
    watcher, guests = Watcher(engine, world), Guests(engine, world, loop)
    engine.add_listener(watcher)
    async with engine:
        with anyio.move_on_after(PATIENCE + steps) as patience:
            async with anyio.create_task_group() as group:
                group.start_soon(guests.keep_coming, group)
                if world.chance.random() < 0.3:
                    group.start_soon(guests.squeeze)
                group.start_soon(guests.rob)
                while watcher.steps < steps and engine.health() != "failed":
                    await anyio.sleep(0.5)
                    if watcher.failure is not None or guests.failure is not None:
                        break
                guests.open = False
            while engine.parts.scheduler.has_work and engine.health() != "failed":
                await anyio.sleep(0.1)  # the last step is still in flight
        for failure in (watcher.failure, guests.failure):
            if failure is not None:
                raise failure
        assert not patience.cancelled_caught, "somebody is never served"
        if engine.health() != "failed":
            pool = engine.parts.scheduler.pool
            assert pool.used == 0, "pages are held by nobody"
            assert not engine.parts.scheduler.has_work
    return watcher.steps
