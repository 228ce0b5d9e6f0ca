"""What the scheduler asks of a step, and what a step gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from engine.scheduling.cost import Work
from engine.scheduling.sequence import Sequence
from engine.scheduling.snapshots import Kept
from engine.types import Decision, TokenLogprob


class Move(IntEnum):
    """What happens to pages before a step computes; see `Plan.moves`."""

    COPY = 0  # page -> page
    DEMOTE = 1  # page -> cold slot
    RESTORE = 2  # cold slot -> page
    DISCARD = 3  # page: its memory is given back
    RESUME = 4  # a state's place -> slot
    COPY_WINDOW = 5  # window page -> window page
    DEMOTE_WINDOW = 6  # window page -> cold slot, beside the page there
    RESTORE_WINDOW = 7  # what lies beside a page in its cold slot -> window page


WINDOW_MOVES = frozenset({Move.COPY_WINDOW, Move.DEMOTE_WINDOW, Move.RESTORE_WINDOW})


@dataclass(slots=True)
class Chunk:
    """`count` tokens of a sequence from position `start`; the last `rows` of them give logits.

    `sample` says that the last row draws the next token; other rows score the prompt. Without
    `write` its keys and values are there already, in a page that is shared. `claims` names the
    pages that it computes. Tokens that are `given` are the last one drawn, which the device need
    not know, and guesses of what follows: all their rows draw.
    """

    sequence: Sequence
    start: int
    count: int
    rows: int
    sample: bool
    write: bool = True
    claims: tuple[bytes, ...] = ()
    given: tuple[int, ...] = ()


@dataclass(slots=True)
class Plan:
    """One step. Its rows are the `decodes`, one each, whose input is the token last drawn at their
    slot (the device has it, whether or not it has been committed), then the `chunks`.

    `admitted` (re)entered their slots, `grown` are decodes with new pages. `moves` are (kind, from,
    to), done in order before anything is computed. `busy` steps take the model's weights for busy
    times; `kept` are states that it keeps on the way. The rest is the scheduler's own: the number
    of guesses that were `accepted`, who has been `dropped` since, and what is given back when the
    step has retired.
    """

    step: int
    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    moves: list[tuple[Move, int, int]] = field(default_factory=list)
    busy: bool = False
    kept: list[tuple[Sequence, Kept]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    predicted: float = 0.0
    accepted: int = 0
    dropped: set[Sequence] = field(default_factory=set)
    retired_pages: list[list[int]] = field(default_factory=list)
    retired_slots: list[int] = field(default_factory=list)

    def note(self, kind: str, sequence: Sequence, reason: str, at: float) -> None:
        """Keep what was decided about a sequence, for whoever is told."""
        decision = Decision(kind, sequence.request.id, reason, at, sequence.index)
        self.decisions.append(decision)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.decodes and not self.chunks and not self.moves

    def live_sequences(self) -> list[Sequence]:
        """Its sequences that still hold what they held when it was planned."""
        every = [*self.decodes, *(chunk.sequence for chunk in self.chunks)]
        return [sequence for sequence in every if sequence not in self.dropped]

    def sequence_at(self, row: int) -> Sequence:
        """Whose a logits row is."""
        if row < len(self.decodes):
            return self.decodes[row]
        row -= len(self.decodes)
        for chunk in self.chunks:
            if row < chunk.rows:
                return chunk.sequence
            row -= chunk.rows
        raise IndexError(row)


@dataclass(slots=True)
class StepResult:
    """What a step gave, one entry per logits row in the plan's order; `seconds` by part. `faults`
    say why rows could not be drawn as their requests ask."""

    ids: list[int]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]
    seconds: dict[str, float]
    faults: dict[int, str] = field(default_factory=dict)

    def logprob(self, row: int) -> TokenLogprob:
        """What a row that wants logprobs got."""
        logprob = self.logprobs[row]
        assert logprob is not None
        return TokenLogprob(self.ids[row], logprob, tuple(self.top[row]))


def score_prompt(chunk: Chunk, result: StepResult, first: int) -> None:
    """Keep the logprobs of prompt tokens; the row of position p scores token p + 1."""
    sequence = chunk.sequence
    if chunk.rows != chunk.count:
        return
    for offset in range(chunk.rows):
        target = chunk.start + offset + 1
        if target == len(sequence.prompt_logprobs) < sequence.prompt_length:
            sequence.prompt_logprobs.append(result.logprob(first + offset))
