"""The iteration-level scheduler (Orca, OSDI 2022): what runs in each step, in pure Python.

There are no phases. Every running sequence's `computed` chases its tokens under one budget of rows
per step, so chunked prefill, prefix hits and recomputation after preemption are the same rule.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.scheduling.pages import PagePool
from engine.scheduling.policy import victim_key, waiting_key
from engine.scheduling.sequence import Sequence, State
from engine.types import Clock, Decision, TokenLogprob

# Logits of every row are large (a vocabulary each), so a step scores few rows of prompts.
MAX_SCORED_ROWS = 64


@dataclass(slots=True)
class Chunk:
    """`count` tokens of a sequence from position `start`; the last `rows` of them give logits.

    `sample` says that the last row draws the next token; other rows score the prompt.
    """

    sequence: Sequence
    start: int
    count: int
    rows: int
    sample: bool


@dataclass(slots=True)
class Plan:
    """One step: chunks in batch order, and the sequences that (re)entered their slots."""

    step: int
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """What a step gave, one entry per logits row in the plan's order; `seconds` by part."""

    ids: list[int]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]
    seconds: dict[str, float]


@dataclass(slots=True)
class Budget:
    """What is left of a step: rows, rows of prefill, and rows whose logits only score a prompt."""

    rows: int
    prefill: int
    scored: int

    def chunk(self, sequence: Sequence, computed: int) -> int:
        """How many tokens of a sequence the step can still take."""
        count = len(sequence.tokens) - computed
        if count > 1:
            count = min(count, self.rows, self.prefill)
        elif not self.rows:
            return 0
        scoring = sequence.wants_prompt_logprobs and computed < sequence.prompt_length - 1
        return min(count, self.scored) if scoring else count


@dataclass(frozen=True)
class SchedulerLimits:
    """`max_batch_tokens` rows and `max_running` sequences a step; beside sequences that are
    decoding, at most `prefill_beside_decodes` rows of prefill, so that their tokens keep coming."""

    max_batch_tokens: int
    max_running: int
    prefill_beside_decodes: int
    prefix_caching: bool = True


class Scheduler:
    """Owns every sequence that is waiting or running, and the pages they hold."""

    def __init__(self, pool: PagePool, limits: SchedulerLimits, clock: Clock) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._clock = clock
        self._steps = 0
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._blocked: tuple[Sequence, str] | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        bisect.insort(self.waiting, sequence, key=waiting_key)

    def plan(self) -> Plan:
        """Choose the next step: running sequences first, then as many waiting ones as fit."""
        plan = Plan(self._steps)
        self._steps += 1
        rows = self.limits.max_batch_tokens
        decoding = sum(len(s.tokens) - s.computed == 1 for s in self.running)
        prefill = rows
        if decoding:
            # Who decodes keeps a row, whatever comes before it.
            prefill = max(1, min(self.limits.prefill_beside_decodes, rows - decoding))
        budget = Budget(rows, prefill, MAX_SCORED_ROWS)
        # In order of importance: who is planned first is safe from making room for later ones.
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING:
                continue  # made room for an earlier one
            count = budget.chunk(sequence, sequence.computed)
            if count > 0 and self._grow(sequence, count, plan):
                self._take(plan, budget, sequence, count)
        self._admit(plan, budget)
        return plan

    def commit(self, plan: Plan, result: StepResult) -> list[tuple[Sequence, bool]]:
        """Apply a step's result. Returns the live sequences it moved, and whether each has a new
        token. Finished ones have given up their pages and slot."""
        moved = []
        row = 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            first, row = row, row + chunk.rows
            if sequence.state is not State.RUNNING:
                continue  # aborted while the step ran
            sequence.computed += chunk.count
            self._publish(sequence)
            if sequence.wants_prompt_logprobs:
                self._score_prompt(chunk, result, first)
            if chunk.sample:
                self._append(sequence, result, row - 1)
            moved.append((sequence, chunk.sample))
        return moved

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | None = None) -> None:
        """End a sequence in any state and give back what it holds; a second call does nothing."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._vacate(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def sequences(self) -> Iterator[Sequence]:
        """Everything that is not finished."""
        yield from self.running
        yield from self.waiting

    def audit(self) -> None:
        """Check every invariant; for tests. Raises AssertionError."""
        self.pool.audit([s.pages for s in self.running])
        held = [s.slot for s in self.running]
        assert sorted(held + self._slots) == list(range(self.limits.max_running)), "a slot is lost"
        assert all(s.state is State.RUNNING for s in self.running)
        assert all(s.state is State.WAITING and not s.pages for s in self.waiting)
        for sequence in self.running:
            assert sequence.computed < len(sequence.tokens), "a running sequence has nothing to do"
            assert sequence.computed <= len(sequence.pages) * self.pool.page_size

    def _admit(self, plan: Plan, budget: Budget) -> None:
        """Move waiting sequences in, in order, until something does not fit."""
        now = self._clock.now()
        position = 0
        while position < len(self.waiting):
            sequence = self.waiting[position]
            if (leader := sequence.leader) is not None:
                if leader.state is State.WAITING or self._computes_prompt(leader):
                    position += 1
                    continue
                sequence.leader = None
            reason = self._try_admit(sequence, plan, budget)
            if reason is not None:
                if self._blocked != (sequence, reason):
                    self._blocked = (sequence, reason)
                    plan.decisions.append(Decision("wait", sequence.request.id, reason, now))
                return
            del self.waiting[position]
            plan.decisions.append(
                Decision("admit", sequence.request.id, f"{sequence.computed} cached tokens", now)
            )

    def _computes_prompt(self, leader: Sequence) -> bool:
        """Whether a leader is still on its way through the prompt that its followers share."""
        return leader.state is State.RUNNING and leader.computed < leader.prompt_length

    def _try_admit(self, sequence: Sequence, plan: Plan, budget: Budget) -> str | None:
        """Give a sequence its slot and pages, or say what is lacking."""
        if budget.chunk(sequence, 0) <= 0:
            return "step budget"
        if not self._slots:
            return "batch full"
        size = self.pool.page_size
        matched: list[int] = []
        if self.limits.prefix_caching and not sequence.wants_prompt_logprobs:
            # The last token is always computed: its logits are what the step is for.
            reusable = (len(sequence.tokens) - 1) // size
            matched = self.pool.match(sequence.page_hashes(reusable, size))
        cached = len(matched) * size
        count = budget.chunk(sequence, cached)
        # Pages for the whole of it now, not chunk by chunk, or two long prompts could each
        # hold half the pool and wait for the other.
        needed = -(-len(sequence.tokens) // size) - len(matched)
        # A page for each running sequence stays free, or the newcomer would be preempted at once.
        fits = needed + len(self.running) <= self.pool.free or not self.running
        fresh = self.pool.allocate(needed) if fits else None
        if fresh is None:
            self.pool.release(matched)
            return "no free pages"
        sequence.pages = matched + fresh
        sequence.published = len(matched)
        sequence.computed = cached
        if sequence.preemptions == 0:
            sequence.cached = cached
            sequence.admitted_at = self._clock.now()
        sequence.slot = self._slots.pop()
        sequence.state = State.RUNNING
        bisect.insort(self.running, sequence, key=waiting_key)
        plan.admitted.append(sequence)
        self._take(plan, budget, sequence, count)
        return None

    def _grow(self, sequence: Sequence, count: int, plan: Plan) -> bool:
        """Make sure pages for `count` more tokens, preempting others if need be.

        Returns False if the sequence itself had to make way.
        """
        needed = -(-(sequence.computed + count) // self.pool.page_size) - len(sequence.pages)
        if needed <= 0:
            return True
        while (fresh := self.pool.allocate(needed)) is None:
            # Those already in this plan are safe: a victim comes from behind, or is this one.
            planned = {id(chunk.sequence) for chunk in plan.chunks}
            candidates = [s for s in self.running if id(s) not in planned]
            victim = min(candidates, key=victim_key)
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        sequence.pages += fresh
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Send a sequence back to the queue; its published pages may survive until it returns."""
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.state = State.WAITING
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        bisect.insort_left(self.waiting, sequence, key=waiting_key)
        now = self._clock.now()
        plan.decisions.append(Decision("preempt", sequence.request.id, "no free pages", now))

    def _vacate(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.published = 0
        self._slots.append(sequence.slot)
        sequence.slot = -1

    def _take(self, plan: Plan, budget: Budget, sequence: Sequence, count: int) -> None:
        """Put a sequence's next tokens into the plan."""
        chunk = self._chunk(sequence, count)
        plan.chunks.append(chunk)
        budget.rows -= count
        if len(sequence.tokens) - sequence.computed > 1:
            budget.prefill -= count
        budget.scored -= chunk.rows - chunk.sample

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start = sequence.computed
        sample = start + count == len(sequence.tokens)
        if sequence.wants_prompt_logprobs and start < sequence.prompt_length - 1:
            return Chunk(sequence, start, count, count, sample)
        return Chunk(sequence, start, count, int(sample), sample)

    def _publish(self, sequence: Sequence) -> None:
        """Make pages findable whose every token has now been computed."""
        full = sequence.computed // self.pool.page_size
        if full == sequence.published:
            return
        if self.limits.prefix_caching:
            hashes = sequence.page_hashes(full, self.pool.page_size)
            for number in range(sequence.published, full):
                self.pool.publish(sequence.pages[number], hashes[number])
        sequence.published = full

    def _score_prompt(self, chunk: Chunk, result: StepResult, first: int) -> None:
        """Keep the logprobs of prompt tokens; the row of position p scores token p + 1."""
        sequence = chunk.sequence
        if chunk.rows != chunk.count:
            return
        for offset in range(chunk.rows):
            target = chunk.start + offset + 1
            if target == len(sequence.prompt_logprobs) < sequence.prompt_length:
                sequence.prompt_logprobs.append(_logprob(result, first + offset))

    def _append(self, sequence: Sequence, result: StepResult, row: int) -> None:
        """Add a drawn token, and finish the sequence if it ends there."""
        token, request = result.ids[row], sequence.request
        sampling = request.sampling
        sequence.tokens.append(token)
        generated = len(sequence.tokens) - sequence.prompt_length
        if sampling.logprobs is not None:
            sequence.logprobs.append(_logprob(result, row))
        if generated >= sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return self.finish(sequence, "stop", token)
            if token in request.eos_token_ids and not sampling.ignore_eos:
                return self.finish(sequence, "stop")
        if generated >= request.max_tokens:
            self.finish(sequence, "length")
        return None


def _logprob(result: StepResult, row: int) -> TokenLogprob:
    logprob = result.logprobs[row]
    assert logprob is not None
    return TokenLogprob(result.ids[row], logprob, tuple(result.top[row]))
