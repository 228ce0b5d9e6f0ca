"""Token histories for penalties, kept up to date as sequences grow."""

from __future__ import annotations

import numpy as np

from engine.scheduling.sequence import Sequence
from kernels.batch import Bool, Int32, Penalty


class Histories:
    """Counts per vocabulary entry, only for slots whose sequence has penalties."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, tuple[Int32, Bool]] = {}
        self._counted: dict[int, int] = {}

    def enter(self, sequence: Sequence) -> None:
        """Start over at the sequence's slot; whatever it held before is forgotten."""
        self._slots.pop(sequence.slot, None)
        if sequence.request.sampling.has_penalties:
            counts = np.zeros(self._vocab_size, np.int32)
            seen = np.zeros(self._vocab_size, np.bool_)
            seen[sequence.tokens[: sequence.prompt_length]] = True
            self._slots[sequence.slot] = (counts, seen)
            self._counted[sequence.slot] = sequence.prompt_length

    def penalty(self, sequence: Sequence, row: int) -> Penalty | None:
        """The history of the sequence up to now, for logits row `row`; None without penalties."""
        held = self._slots.get(sequence.slot)
        if held is None:
            return None
        counts, seen = held
        for token in sequence.tokens[self._counted[sequence.slot] :]:
            counts[token] += 1
            seen[token] = True
        self._counted[sequence.slot] = len(sequence.tokens)
        return Penalty(row, counts, seen)
