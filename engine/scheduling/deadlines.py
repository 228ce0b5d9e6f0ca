"""Who is too late."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from engine.scheduling.sequence import Sequence, State

# Deadlines that are kept before those of finished sequences are thrown out.
MANY = 1024


class Deadlines:
    """Sequences by deadline: their answer's, and their first token's."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._added = 0
        self._limit = MANY

    def add(self, sequence: Sequence) -> None:
        """Watch a new sequence's deadlines, if it has any."""
        for deadline in (sequence.request.deadline, sequence.request.first_token_deadline):
            if not math.isinf(deadline):
                self._added += 1
                heapq.heappush(self._heap, (deadline, self._added, sequence))
        if len(self._heap) > self._limit:
            # Deadlines may be a day away, and those who met theirs should not stay as long.
            self._heap = [entry for entry in self._heap if entry[2].state is not State.FINISHED]
            heapq.heapify(self._heap)
            self._limit = max(MANY, 2 * len(self._heap))

    @property
    def next(self) -> float:
        """The earliest deadline that is watched."""
        return self._heap[0][0] if self._heap else math.inf

    def passed(self, now: float) -> Iterator[Sequence]:
        """Unfinished sequences that have missed one; each is given once."""
        while self._heap and self._heap[0][0] <= now:
            deadline, _, sequence = heapq.heappop(self._heap)
            met = sequence.generated > 0 and deadline < sequence.request.deadline
            if sequence.state is not State.FINISHED and not met:
                yield sequence
