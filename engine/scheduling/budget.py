"""How much of the prompts fits into a step: a budget of time beside those who decode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from engine.scheduling.cost import CostModel, Work
from engine.scheduling.plan import Chunk
from engine.scheduling.sequence import Sequence

# Logits of every row are large (a vocabulary each), so a step scores few rows of prompts.
MAX_SCORED_ROWS = 64
# Without a target of one's own a step beside decodes may take this, or so many times what the
# decodes take alone.
EASY_SECONDS, EASY_FACTOR = 0.015, 1.4
# Once a prompt has been under way for so long, so many times: room for about as many rows of
# prompts as of decodes, where a row costs the same. With less, half of the slots wait for prompts.
OVERDUE_SECONDS, OVERDUE_FACTOR = 1.0, 2.2
# The part of a target that steps are planned for, so that most that take longer still keep to it.
MARGIN = 0.8


@dataclass(frozen=True)
class Pace:
    """Seconds that a step may be predicted to take: `target` beside sequences that decode (0 finds
    one that they hardly notice, or bear while a prompt is overdue), `longest` ever."""

    target: float = 0.0
    longest: float = 0.25


@dataclass(frozen=True)
class SchedulerLimits:
    """`max_batch_tokens` rows and `max_running` sequences a step, `max_prefilling` of them still in
    their prompts; `patience` is the seconds after which a request without a deadline is due, and
    `lease` those for which pages of what is to go on are kept. At most `speculative_tokens` are
    guessed at once for a sequence."""

    max_batch_tokens: int
    max_running: int
    pace: Pace = field(default_factory=Pace)
    max_prefilling: int = 8
    patience: float = 30.0
    prefix_caching: bool = True
    lease: float = 120.0
    speculative_tokens: int = 0


def longest_step(pace: Pace, decodes: Iterable[Sequence]) -> float:
    """What a step may be predicted to take beside `decodes`, however easily it is borne."""
    target = MARGIN * pace.target if pace.target else pace.longest
    # One request may hurry, but not so that nobody's prompt gets on.
    wanted = [
        max(EASY_SECONDS, MARGIN * s.request.target_itl) for s in decodes if s.request.target_itl
    ]
    return min([target, pace.longest, *wanted])


def is_overdue(prompt: Sequence, now: float) -> bool:
    """Whether a prompt should have been read by now, or what made way comes back."""
    return prompt.admitted_at is not None and now - prompt.admitted_at > OVERDUE_SECONDS


class Budget:
    """What is left of one step, and the work that is in it so far: `rows` beside `decodes`; a
    prompt may be `overdue`."""

    def __init__(
        self,
        cost: CostModel,
        work: Work,
        pace: Pace,
        page_size: int,
        rows: int,
        decodes: list[Sequence],
        overdue: bool = False,
    ) -> None:
        self._cost = cost
        self._work = work
        self._size = page_size
        self._rows = rows
        self._scored = max(MAX_SCORED_ROWS, page_size)
        self._begun = False
        self._limit = self._seconds(pace, decodes, overdue) if decodes else pace.longest

    def _seconds(self, pace: Pace, decodes: list[Sequence], overdue: bool) -> float:
        """What the step may be predicted to take beside `decodes`."""
        factor = OVERDUE_FACTOR if overdue else EASY_FACTOR
        easy = max(EASY_SECONDS, factor * self._cost.predict(self._work))
        return min(longest_step(pace, decodes), pace.longest if pace.target else easy)

    def chunk(self, sequence: Sequence) -> int:
        """How many tokens of a prompt the step can still take: whole pages, or all that is left of
        it. The first prompt of a step gets on by a page, whatever that takes."""
        size, start = self._size, sequence.scheduled
        remaining = len(sequence.tokens) - start
        most = min(remaining, self._rows)
        scoring = sequence.wants_prompt_logprobs and start < sequence.prompt_length - 1
        if scoring:
            most = min(most, self._scored)
        if most < remaining:
            most -= (start + most) % size
        if most <= 0:
            return 0
        least = min(most, size - start % size)
        if self._fits(sequence, most):
            return most
        # The largest number of whole pages within the limit.
        low, high = 0, (most - least + size - 1) // size
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(sequence, least + middle * size):
                low = middle
            else:
                high = middle
        count = least + low * size
        if low == 0 and self._begun and not self._fits(sequence, least):
            return 0
        return count

    def take(self, chunk: Chunk) -> None:
        """Count a chunk that is in the plan."""
        self._begun = True
        self._rows -= chunk.count
        self._scored -= chunk.rows - chunk.sample
        self._add(self._work, chunk.sequence, chunk.count, chunk.rows)

    def _fits(self, sequence: Sequence, count: int) -> bool:
        work = replace(self._work)
        sample = sequence.scheduled + count == len(sequence.tokens)
        self._add(work, sequence, count, int(sample))
        return self._cost.predict(work) <= self._limit

    def _add(self, work: Work, sequence: Sequence, count: int, rows: int) -> None:
        work.prefill += count
        work.sampled += rows
        work.prefill_pages += count * (sequence.scheduled // self._size)
