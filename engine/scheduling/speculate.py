"""Speculative decoding from the text itself: what followed the last few tokens before is guessed to
follow them again (prompt lookup, Saxena 2023), and checked in one step.

A step that is given guesses draws a token at each of their places. Draws depend on their place
alone, so as long as they agree with the guesses they are what would have been drawn one by one, and
the answer is the same. How much is guessed is what the cost model says is worth it; nothing, once
the batch is busy.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence as List

from engine.scheduling.budget import MAX_SCORED_ROWS, SchedulerLimits, longest_step
from engine.scheduling.cost import CostModel, Work
from engine.scheduling.sequence import Sequence

# Tokens that have to have been there before, and sequences among which guessing is considered.
GRAM, MOST_RUNNING = 3, 8
# How far back is looked, in the end, and how much further at each token: the loop does not wait.
WINDOW, STRIDE = 32_768, 256
# How likely a guess is to be right before anything is known, and how fast that is learned.
FIRST_RATE, LEARNING = 0.6, 0.25
# Below this a sequence guesses nothing for so many tokens, then twice as many, and so on.
POOR_RATE, REST = 0.25, 32
# What has to be gained to be worth waiting for the step in flight.
WORTH = 1.1
# Recent waits for a step in flight, whose median is what the next is expected to cost.
WAITS = 15
# Rows of guesses in a step: their logits take memory.
MOST_GUESSES = MAX_SCORED_ROWS


class Track:
    """Where each run of tokens of a sequence was last followed by something, and how its guesses
    have fared."""

    __slots__ = ("_ends", "_gram", "_indexed", "_oldest", "rate", "rest", "until")

    def __init__(self, gram: int) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._gram = gram
        # Runs that end from the one place to the other are known.
        self._oldest = self._indexed = 0
        self.rate = FIRST_RATE
        self.until = 0
        self.rest = REST

    def find(self, tokens: List[int]) -> int | None:
        """The place after the last earlier occurrence of the final tokens."""
        gram, length = self._gram, len(tokens)
        if length - self._indexed > STRIDE:
            # At first, and after a while in which nothing was asked.
            self.clear()
            self._oldest = self._indexed = max(gram, length)
        for end in range(self._indexed, length):
            self._ends[tuple(tokens[end - gram : end])] = end
        self._indexed = max(self._indexed, length)
        oldest = max(gram, self._oldest - STRIDE, length - WINDOW)
        for end in range(self._oldest - 1, oldest - 1, -1):
            self._ends.setdefault(tuple(tokens[end - gram : end]), end)
        self._oldest = min(self._oldest, oldest)
        return self._ends.get(tuple(tokens[-gram:])) if length >= self.until else None

    def clear(self) -> None:
        """Forget the text, but not how guesses have fared."""
        self._ends = {}
        self._oldest = self._indexed = 0


class Speculator:
    """Guesses for sequences that decode, and counts of what came of it."""

    def __init__(self, cost: CostModel, page_size: int, limits: SchedulerLimits) -> None:
        self.steps = self.drafted = self.accepted = 0
        self.most = limits.speculative_tokens
        self.gram = GRAM
        self._cost = cost
        self._size = page_size
        self._rows = limits.max_batch_tokens
        self._pace = limits.pace
        self._tracks: dict[Sequence, Track | None] = {}
        self._waits: deque[float] = deque(maxlen=WAITS)
        self._wait = 0.0

    def guesses(self, decoding: List[Sequence]) -> dict[Sequence, tuple[int, ...]] | None:
        """What is guessed to follow, for those where that is worth it; None if it is worth waiting
        for the step in flight, since it has tokens on which guesses depend."""
        if not self.most or len(decoding) > MOST_RUNNING:
            return {}
        found = dict[Sequence, int]()
        for sequence in decoding:
            track = self._track(sequence)
            place = None if track is None else track.find(sequence.tokens)
            if place is not None:
                found[sequence] = place
        if not found:
            return {}
        counts = self._worth(decoding, found)
        if any(s.scheduled >= len(s.tokens) for s in counts):
            return None
        return {s: _continued(s.tokens, found[s], count) for s, count in counts.items()}

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """How many of a sequence's guesses were right."""
        track = self._tracks.get(sequence)
        self.steps += drafted > 0
        self.drafted += drafted
        self.accepted += accepted
        if not drafted or track is None:
            return
        # The first wrong one says nothing about those behind it.
        tried = min(accepted + 1, drafted)
        track.rate += LEARNING * (accepted / tried - track.rate)
        if track.rate < POOR_RATE:
            track.until = len(sequence.tokens) + track.rest
            track.rest *= 2
            track.rate = FIRST_RATE

    def waited(self, seconds: float) -> None:
        """The device has had nothing to do for so long, since guesses depend on its last step."""
        self._waits.append(seconds)
        self._wait = statistics.median(self._waits)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._tracks.pop(sequence, None)

    def set_aside(self, sequence: Sequence) -> None:
        """A sequence runs no more for now, and should hold no memory."""
        if (track := self._tracks.get(sequence)) is not None:
            track.clear()

    def _track(self, sequence: Sequence) -> Track | None:
        """None for those whose draws depend on what was drawn before."""
        if sequence not in self._tracks:
            sampling = sequence.request.sampling
            depends = (
                sampling.repetition_penalty != 1.0
                or sampling.presence_penalty
                or sampling.frequency_penalty
                or sampling.logit_bias
                or sampling.min_tokens
                or sampling.grammar is not None
            )
            self._tracks[sequence] = None if depends else Track(self.gram)
        return self._tracks[sequence]

    def _worth(self, decoding: List[Sequence], found: dict[Sequence, int]) -> dict[Sequence, int]:
        """How many tokens to guess for whom, so that most tokens are expected a second, within what
        a step may take and hold."""
        pages = {s: len(s.tokens) // self._size + 1 for s in decoding}
        work = Work(decodes=len(decoding), pages=sum(pages.values()))
        tokens, most_rows = float(len(decoding)), min(self._rows, len(decoding) + MOST_GUESSES)
        alone = self._cost.predict(work)
        plain = best = tokens / alone
        # No more than that, or nothing would ever show that a slow spell is over.
        wait = min(self._wait, alone)
        limit = longest_step(self._pace, decoding)
        counts: dict[Sequence, int] = {}
        for sequence in found:
            track = self._tracks[sequence]
            assert track is not None
            rows, expected, chance = work.decodes, tokens, 1.0
            room = sequence.final_length - len(sequence.tokens) - 1
            read = work.pages
            for count in range(1, min(self.most, room, most_rows - rows) + 1):
                chance *= track.rate
                expected += chance
                # Each row reads the pages before it.
                seconds = self._cost.decode_seconds(rows + count, read + count * pages[sequence])
                if seconds > limit:
                    break
                if expected / (seconds + wait) > best:
                    best, counts[sequence] = expected / (seconds + wait), count
                    work.decodes, tokens = rows + count, expected
                    work.pages = read + count * pages[sequence]
        return counts if best > WORTH * plain else {}


def _continued(tokens: List[int], place: int, count: int) -> tuple[int, ...]:
    """What follows a place, and goes on as it repeats itself."""
    guess: list[int] = []
    for at in range(place, place + count):
        guess.append(tokens[at] if at < len(tokens) else guess[at - len(tokens)])
    return tuple(guess)
