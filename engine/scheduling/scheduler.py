"""The iteration-level scheduler (Orca, OSDI 2022): what runs in each step, in pure Python.

There are no phases. Every running sequence's `scheduled` chases its tokens, under one budget of
time a step, so chunked prefill, prefix hits and recomputation after preemption are the same rule. A
step can be planned while the one before it runs; what a step names is given back when it retires.
"""

from __future__ import annotations

import bisect
from collections import deque

from engine.errors import ConfigError
from engine.scheduling.budget import Budget, SchedulerLimits, is_overdue
from engine.scheduling.cold import ColdIndex
from engine.scheduling.commit import Committer
from engine.scheduling.cost import CostModel
from engine.scheduling.deadlines import Deadlines
from engine.scheduling.leases import Leases
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Chunk, Plan, StepResult
from engine.scheduling.policy import OutputLengths, prefill_key, victim_key
from engine.scheduling.precision import Precision
from engine.scheduling.recurrent import prefixes_of
from engine.scheduling.room import BESIDE, BUSY, FULL, NO_PAGES, OUT_OF_TURN, Room
from engine.scheduling.sequence import Sequence, State, by_order, take_out
from engine.scheduling.snapshots import Snapshots
from engine.scheduling.speculate import Speculator
from engine.scheduling.tenants import Account, FairQueue, order_key
from engine.types import Clock


class Scheduler:
    """Owns every sequence that is waiting or running, and the pages they hold."""

    def __init__(
        self,
        pool: PagePool,
        limits: SchedulerLimits,
        clock: Clock,
        cost: CostModel,
        *,
        cold: ColdIndex | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        if limits.max_batch_tokens < limits.max_running + pool.page_size:
            raise ConfigError(
                f"scheduler.max_batch_tokens is {limits.max_batch_tokens}; it must hold a row for "
                f"each of {limits.max_running} sequences and {pool.page_size} prompt tokens"
            )
        self.pool = pool
        self.limits = limits
        self.cost = cost
        self.queue = FairQueue()
        self.cold = ColdIndex() if cold is None else cold
        self.lengths = OutputLengths()
        self.deadlines = Deadlines()
        # Both in order of importance; a sequence decodes once its first token is planned.
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.in_flight: deque[Plan] = deque()
        self.preemptions = 0
        self.prefixes = prefixes_of(pool, self.cold, snapshots, limits.prefix_caching)
        self.leases = Leases(self.prefixes, clock, limits.lease)
        self.speculator = Speculator(cost, pool.page_size, limits)
        self._precision = Precision(cost, limits, pool.page_size)
        self._committer = Committer(self.prefixes, self.speculator, self.finish)
        # Those of whose tokens the device does not know the last.
        self._guessed: set[Sequence] = set()
        self._room = Room(self.prefixes, self.queue, self.lengths, limits.max_running)
        self._clock = clock
        self._steps = 0
        self._idle_since: float | None = None
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._entered: set[Sequence] = set()
        self._freed = 0
        self._blocked: tuple[Sequence, str, int] | None = None
        self._told: dict[Account, tuple[Sequence, str]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, now or when those in flight have retired."""
        return bool(self.decoding or self.prefilling or len(self.queue) or self.in_flight)

    @property
    def running(self) -> list[Sequence]:
        """All that hold a slot."""
        return [*self.decoding, *self.prefilling]

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        rows, size = self.limits.max_batch_tokens, self.pool.page_size
        seconds = self.cost.prefill_seconds(sequence.prompt_length, rows, size)
        sequence.order = order_key(sequence, seconds, self.limits.patience)
        self.queue.add(sequence, self._clock.now())
        self.deadlines.add(sequence)

    def plan(self) -> Plan:
        """Choose the next step: whoever decodes, then prompts as far as time allows. An empty plan
        means that there is nothing to do before the steps in flight have retired."""
        plan = Plan(self._steps)
        self.leases.expire()
        if len(self.queue):
            self._make_way(plan)
        self._plan_decodes(plan)
        if len(self.queue):
            self._admit(plan)
        plan.busy = self._precision.choose(
            self._clock.now(), self.decoding, self.prefilling, self.queue, self._told
        )
        if self.prefilling:
            self._plan_prefills(plan)
        if self.prefilling and plan.is_empty and not self.in_flight:
            self._plan_prefills(plan)  # whoever was waited for has made way
        if plan.is_empty and not self.prefixes.urgent:
            return plan
        self._steps += 1
        if self.prefixes.moves:
            plan.moves, sources = self.prefixes.take_moves()
            plan.retired_pages += sources
        plan.predicted = self.cost.predict(plan.work)
        self.in_flight.append(plan)
        return plan

    def commit(self, plan: Plan, result: StepResult) -> list[Sequence]:
        """Apply the result of the oldest step in flight. Returns the live sequences that have a new
        token. Finished ones have given up their pages and slot."""
        assert plan is self.in_flight[0], "steps retire in order"
        self.in_flight.popleft()
        self._idle_since = None if self.in_flight else self._clock.now()
        moved = self._committer.decodes(plan, result)
        row = len(plan.decodes)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            first, row = row, row + chunk.rows
            if sequence in plan.dropped:
                continue
            if chunk.given:
                plan.accepted += self._committer.given(chunk, result, first)
                moved.append(sequence)
            elif self._committer.prompt(chunk, result, first):
                self.leases.came_back(sequence)
                moved.append(sequence)
        self._retire(plan, done=True)
        return moved

    def observe(self, plan: Plan, result: StepResult, seconds: float) -> None:
        """Learn from what a step took."""
        if plan.moves:
            seconds -= self.prefixes.moved(plan, result.seconds.get("move", 0.0))
        self.cost.observe(plan.work, seconds, busy=plan.busy)

    def discard(self, plan: Plan) -> list[Sequence]:
        """The oldest step in flight has failed. Returns the live sequences that the caller has to
        end: its own, and those that count on the moves of pages it should have made.
        """
        assert plan is self.in_flight[0], "steps retire in order"
        self.in_flight.popleft()
        lost = set(plan.live_sequences())
        if plan.moves:
            lost.update(s for s in self.prefilling if s.pages)
            for later in self.in_flight:
                lost.update(later.live_sequences())
        self.cold.clear()
        self._retire(plan, done=False)
        return sorted(lost, key=by_order)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | None = None) -> None:
        """End a sequence in any state and give back what it holds; a second call does nothing."""
        if sequence.state is State.FINISHED:
            return
        self.leases.drop(sequence)
        self.speculator.forget(sequence)
        if sequence.state is State.RUNNING:
            if reason in ("stop", "length"):
                self.lengths.record(sequence.generated)
                self.leases.keep(sequence.request.lease, sequence)
            self._vacate(sequence, named=reason != "error")
        elif sequence.state is State.WAITING:
            self.queue.remove(sequence)
        sequence.state = State.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def pause(self, sequence: Sequence) -> None:
        """Set an unfinished sequence aside, alone, until `unpause`; a second call does nothing."""
        if sequence.state is State.RUNNING:
            self.leases.keep(sequence, sequence)
            self._vacate(sequence)
            sequence.preemptions += 1
        elif sequence.state is State.WAITING:
            self.queue.remove(sequence)
        else:
            return
        sequence.state = State.PAUSED

    def unpause(self, sequence: Sequence) -> None:
        """Let a sequence that was set aside queue again, in its place; others are left alone."""
        if sequence.state is State.PAUSED:
            sequence.state, sequence.entered_at = State.WAITING, None
            self.queue.put_back(sequence)

    def waits_for(self, account: Account) -> str:
        """Why the first of a tenant's queue was not let in, as it was last told."""
        return self._told[account][1] if account in self._told else "queued"

    def resize(self, pages: int) -> int:
        """Bring the pages in use to about `pages`; only free ones can go. Returns the change."""
        change = pages - self.pool.available
        if change < 0:
            return -self.prefixes.park(-change)
        self._freed += 1
        return len(self.pool.unpark(change))

    # Planning

    def _plan_decodes(self, plan: Plan) -> None:
        """One row for each sequence that decodes; those that cannot get a page sit out or go."""
        decodes, context = plan.decodes, 0
        given = self._plan_given(plan)
        if given is None:
            return
        decoding = list(self.decoding) if self.pool.spare < len(self.decoding) else self.decoding
        for sequence in decoding:
            if given and sequence in given:
                continue
            at = sequence.scheduled
            if at >= sequence.horizon and not self._extend(sequence, plan):
                continue
            sequence.scheduled = at + 1
            context += at
            decodes.append(sequence)
        work = plan.work
        work.decodes += len(decodes)
        work.pages += context // self.pool.page_size + len(decodes)

    def _plan_given(self, plan: Plan) -> set[Sequence] | None:
        """Sequences whose last token has to be given, with guesses if they are worth it; None if
        the step in flight should be waited for."""
        quiet = not self.prefilling and not len(self.queue)
        guesses = self.speculator.guesses(self.decoding) if quiet else {}
        if guesses is None:
            return None
        if guesses and self._idle_since is not None:
            self.speculator.waited(self._clock.now() - self._idle_since)
        given = self._guessed | guesses.keys()
        for sequence in sorted(given, key=by_order):
            length, size = len(sequence.tokens), self.pool.page_size
            if sequence.state is not State.RUNNING or sequence.scheduled >= length:
                continue
            guess = guesses.get(sequence, ())
            needed = -(-(length + len(guess)) // size) - len(sequence.pages)
            if needed > self.pool.spare - len(self.decoding):
                guess = ()  # nobody goes for a guess, or waits
            count = 1 + len(guess)
            if not self._grow(sequence, count, plan):
                continue
            tokens = (sequence.tokens[-1], *guess)
            plan.chunks.append(Chunk(sequence, length - 1, count, count, not guess, given=tokens))
            sequence.scheduled = length - 1 + count
            plan.work.decodes += count
            plan.work.pages += count * (length // size + 1)
            # What it draws last is known to the device only if it draws once.
            (self._guessed.add if guess else self._guessed.discard)(sequence)
        return given

    def _extend(self, sequence: Sequence, plan: Plan) -> bool:
        """Let a sequence that decodes go on, if it has tokens left to draw."""
        goes_on = sequence.decoding and sequence.scheduled < sequence.final_length - 1
        return goes_on and self._grow(sequence, 1, plan)

    def _plan_prefills(self, plan: Plan) -> None:
        """Prompts share what is left of the step: shortest remaining first, after those whose
        tenant has no more than its share."""
        now = self._clock.now()
        rows = self.limits.max_batch_tokens - plan.work.decodes
        size = self.pool.page_size
        beside = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
        token_seconds = self.cost.token_seconds(self.limits.max_batch_tokens)
        ordered = sorted(
            (self._room.exceeds_share(s.account), prefill_key(s, now, token_seconds), n)
            for n, s in enumerate(self.prefilling)
        )
        overdue = any(not much and is_overdue(self.prefilling[n], now) for much, _, n in ordered)
        budget = Budget(self.cost, plan.work, self.limits.pace, size, rows, beside, overdue)
        for sequence in [self.prefilling[n] for *_, n in ordered]:
            if sequence.state is not State.RUNNING:
                continue  # made room for an earlier one
            if not self.prefixes.catch_up(sequence):
                continue
            count = self.prefixes.cut(sequence, budget.chunk(sequence))
            if count > 0 and self._grow(sequence, count, plan):
                self._take(plan, budget, sequence, count)

    def _take(self, plan: Plan, budget: Budget, sequence: Sequence, count: int) -> None:
        """Put a sequence's next tokens into the plan."""
        start, length = sequence.scheduled, len(sequence.tokens)
        sample = start + count == length
        rows = int(sample)
        if sequence.wants_prompt_logprobs and start < sequence.prompt_length - 1:
            rows = count
        write = start >= sequence.shared * self.pool.page_size
        chunk = Chunk(sequence, start, count, rows, sample, write)
        self.prefixes.claim(chunk, plan)
        plan.chunks.append(chunk)
        budget.take(chunk)
        sequence.scheduled = start + count
        if sequence in self._entered:
            self._entered.discard(sequence)
            plan.admitted.append(sequence)
        sequence.charge(start, start + count)
        if sample:
            self.prefilling.remove(sequence)
            sequence.decoding = True
            bisect.insort(self.decoding, sequence, key=by_order)

    # Admission

    def _admit(self, plan: Plan) -> None:
        """Move waiting sequences in, the fairest first, until something does not fit. A tenant that
        has what it may have is passed over; others go on, as far as its claim to be served allows.
        """
        passed, claims = set[Account](), list[Account]()
        while (sequence := self.queue.head(passed)) is not None:
            above = self._room.exceeds_share(sequence.account)
            # Whoever is below its share does not wait for the long prompts of others.
            most = self.limits.max_prefilling + (0 if above else BESIDE)
            if len(self.prefilling) >= most:
                reason: str | None = BUSY
            elif len(self._slots) <= self._room.reserved(sequence.account):
                reason = FULL
            elif claims and self._room.outruns(sequence, claims, self.running):
                reason = OUT_OF_TURN
            elif self._blocked == (sequence, NO_PAGES, self._freed):
                return
            else:
                reason = self._room.lacking(sequence, self.running)
            if reason is None:
                self._enter(sequence, plan)
                continue
            self._wait(sequence, reason, plan)
            if reason == NO_PAGES or not self._slots:
                return
            passed.add(sequence.account)
            if reason in (BUSY, FULL):
                claims.append(sequence.account)

    def _wait(self, sequence: Sequence, reason: str, plan: Plan) -> None:
        """Note why the head of the queue waits."""
        if self._told.get(sequence.account) != (sequence, reason):
            self._told[sequence.account] = (sequence, reason)
            plan.note("wait", sequence, reason, self._clock.now())
        self._blocked = (sequence, reason, self._freed)

    def _make_way(self, plan: Plan) -> None:
        """See that a tenant gets its share of what the head of the queue waits for. One sequence
        goes at a time."""
        head = self.queue.head()
        if head is None or any(flying.retired_slots for flying in self.in_flight):
            return
        short = self._blocked is not None and self._blocked[:2] == (head, NO_PAGES)
        victim = self._room.who_makes_way(head.account, len(self._slots), short, self.running)
        if victim is not None:
            self._preempt(victim, plan, "its tenant is above its share")

    def _enter(self, sequence: Sequence, plan: Plan) -> None:
        self.queue.remove(sequence)
        sequence.account.running += 1
        now = self._clock.now()
        sequence.enter(self._slots.pop(), now)
        bisect.insort(self.prefilling, sequence, key=by_order)
        self._entered.add(sequence)
        self._blocked = None
        self._told.pop(sequence.account, None)
        reason = f"{self.prefixes.known_pages(sequence)} pages known"
        plan.note("admit", sequence, reason, now)

    # Room

    def _grow(self, sequence: Sequence, count: int, plan: Plan) -> bool:
        """Make sure pages for `count` more tokens, preempting others if need be.

        Returns False if the sequence has to sit out: for pages that a step in flight still names,
        or because it had to make way itself.
        """
        size = self.pool.page_size
        needed = -(-(sequence.scheduled + count) // size) - len(sequence.pages)
        while needed > 0 and not self.prefixes.extend(sequence, needed):
            coming = sum(len(p) for flying in self.in_flight for p in flying.retired_pages)
            if coming >= needed or any(s.scheduled >= s.final_length - 1 for s in self.decoding):
                return False  # they come with steps in flight, also those of who ends there
            if needed <= self.pool.free and sequence.computed < sequence.scheduled:
                return False  # its own window moves on when its step retires
            # Safe are those in this plan, and the first in order, so that somebody always gets on.
            safe = {*plan.decodes, *(chunk.sequence for chunk in plan.chunks)}
            safe.add(min(self.running, key=by_order))
            candidates = [s for s in self.running if s not in safe]
            if not candidates:
                return False
            victim = min(candidates, key=lambda s: victim_key(s, size))
            self._preempt(victim, plan, NO_PAGES)
            if victim is sequence:
                return False
        if needed > 0 and sequence.decoding:
            plan.grown.append(sequence)
            self.prefixes.grew(sequence, plan)
        sequence.horizon = min(len(sequence.pages) * size, sequence.final_length - 1)
        return True

    def _preempt(self, sequence: Sequence, plan: Plan, reason: str) -> None:
        """Send a sequence back to the queue; its published pages may survive until it returns."""
        self._vacate(sequence)
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.queue.put_back(sequence)
        plan.note("preempt", sequence, reason, self._clock.now())

    def _vacate(self, sequence: Sequence, *, named: bool = True) -> None:
        """Take slot and pages; while a step is in flight that may name them, when it retires. What
        it has computed can be found from now on, if that is to be `named`."""
        if named:
            self.prefixes.publish(sequence)
        if sequence.decoding:
            take_out(self.decoding, sequence)
        else:
            self.prefilling.remove(sequence)
        self.prefixes.left(sequence)
        if self.in_flight:
            for plan in self.in_flight:
                plan.dropped.add(sequence)
            self.in_flight[-1].retired_pages.append(sequence.pages)
            self.in_flight[-1].retired_slots.append(sequence.slot)
        else:
            self.pool.release(sequence.pages)
            self._slots.append(sequence.slot)
        self._freed += 1
        self._entered.discard(sequence)
        self._guessed.discard(sequence)
        self.speculator.set_aside(sequence)
        sequence.account.running -= 1
        sequence.leave()

    def _retire(self, plan: Plan, *, done: bool) -> None:
        """Give back what only this step still named."""
        self.prefixes.retire(plan, done=done)
        if plan.retired_pages or plan.retired_slots:
            for pages in plan.retired_pages:
                self.pool.release(pages)
            self._slots += plan.retired_slots
            self._freed += 1
