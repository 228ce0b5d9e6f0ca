"""Token histories for penalties, kept where tokens are drawn."""

from __future__ import annotations

import numpy as np

from engine.scheduling.sequence import Sequence
from kernels.batch import Bool, Int32, Penalty


class Histories:
    """Counts per vocabulary entry, only for slots whose sequence has penalties."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, tuple[Int32, Bool]] = {}

    def enter(self, sequence: Sequence) -> None:
        """Start over at the sequence's slot; whatever it held before is forgotten."""
        self._slots.pop(sequence.slot, None)
        if sequence.request.sampling.has_penalties:
            counts = np.zeros(self._vocab_size, np.int32)
            seen = np.zeros(self._vocab_size, np.bool_)
            seen[sequence.tokens] = True
            for token in sequence.tokens[sequence.prompt_length :]:
                counts[token] += 1
            self._slots[sequence.slot] = (counts, seen)

    def penalty(self, slot: int, row: int) -> Penalty | None:
        """The history at a slot, for logits row `row`; None without penalties."""
        held = self._slots.get(slot)
        return None if held is None else Penalty(row, *held)

    def add(self, slots: list[int], tokens: list[int]) -> None:
        """Note the tokens that a step drew."""
        if not self._slots:
            return
        for slot, token in zip(slots, tokens, strict=True):
            held = self._slots.get(slot)
            if held is not None:
                held[0][token] += 1
                held[1][token] = True
