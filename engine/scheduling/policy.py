"""Who runs next, who makes way, and how much room everybody is going to need."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable

from engine.scheduling.sequence import Sequence

# Finished outputs whose lengths say how long the next ones will be, and how many it takes.
LENGTHS, ENOUGH_LENGTHS = 512, 16
# The share of observed outputs that an expected length covers.
COVERED = 0.9
# How much a second of waiting moves a prompt ahead, in seconds of computing.
AGEING = 0.25


def prefill_key(sequence: Sequence, now: float, token_seconds: float) -> float:
    """Order of partial prefills: shortest remaining time first, and whoever was let in ages.

    The time in the queue does not count, or who floods it would come first once let in.
    """
    remaining = (len(sequence.tokens) - sequence.scheduled) * token_seconds
    return remaining - AGEING * (now - (sequence.admitted_at or 0.0))


def victim_key(sequence: Sequence, page_size: int) -> tuple[float, ...]:
    """Order of preemption, least first: lowest priority, then who loses least work.

    Pages that were found in the cache are likely to be found again.
    """
    lost = sequence.computed - sequence.shared * page_size
    return (sequence.request.priority, lost, -sequence.request.arrival, -sequence.index)


class OutputLengths:
    """How long recent outputs were, to discount `max_tokens`."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def record(self, length: int) -> None:
        """Note a finished output's tokens."""
        self._recent.append(length)
        bisect.insort(self._sorted, length)
        if len(self._recent) > LENGTHS:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]

    def expected(self, generated: int, max_tokens: int) -> int:
        """What an output of `generated` tokens so far is expected to reach in the end."""
        first = bisect.bisect_right(self._sorted, generated)
        longer = len(self._sorted) - first
        if longer < ENOUGH_LENGTHS:
            return max_tokens
        return min(max_tokens, self._sorted[first + int(COVERED * longer)])


def peak_pages(needs: Iterable[tuple[int, int]]) -> int:
    """The most pages that sequences will hold together, given (held now, still to come) of each.

    In the order of who has most to come, the i-th to finish last does so when i are left, each
    having grown as much (the "past-future" rule of LightLLM, arXiv 2507.10150).
    """
    peak = held = 0
    for rank, (now, remaining) in enumerate(sorted(needs, key=lambda n: -n[1]), start=1):
        held += now
        peak = max(peak, held + remaining * rank)
    return peak
