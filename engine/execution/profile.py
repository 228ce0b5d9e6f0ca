"""The profile of a machine: what steps of some shapes take, measured at start and kept on disk."""

from __future__ import annotations

import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from engine.scheduling.cost import Profile
from engine.scheduling.plan import Chunk, Plan
from engine.scheduling.sequence import Sequence
from engine.types import Request, SamplingParams

logger = logging.getLogger("ryzanstein.engine")

REPEATS = 3
# Rows of decodes that are timed with short and with long contexts, and rows of a later chunk.
DECODES, CHUNK = 16, 64
# Rows up to which an earlier start's measurement is checked, and how many times what such a step
# takes now it may have taken then.
CHECKED, SLOWER = 16, 1.5


class Shape(msgspec.Struct, frozen=True):
    """What steps can be made of."""

    step_tokens: int
    slots: int
    context: int
    page_size: int
    pages: int
    vocab_size: int
    window_pages: int = 0

    @property
    def measured(self) -> Shape:
        """The same with no more pages than make a difference to what is measured."""
        longest = -(-self.context // self.page_size) + 1
        pages = min(self.pages, max(longest, self.filled))
        window_pages = min(self.window_pages, self.filled)
        return msgspec.structs.replace(self, pages=pages, window_pages=window_pages)

    @property
    def filled(self) -> int:
        """Pages that the largest prompts fill: a page's first touch costs more than later ones."""
        most = min(self.step_tokens, self.longest)
        return REPEATS * (-(-(most + 1) // self.page_size))

    @property
    def longest(self) -> int:
        """Tokens of a sequence, with room for one more."""
        return max(1, min(self.context - 1, (self.pages - 1) * self.page_size))


class Profiler:
    """Times steps of made-up sequences on `run`; what they write is never published."""

    def __init__(self, run: Callable[[Plan], object], shape: Shape, *, busy: bool = False) -> None:
        self._run = run
        self._busy = busy
        self._shape = shape
        self._longest = shape.longest
        self._most = min(shape.step_tokens, self._longest)
        self._next_page = itertools.cycle(range(min(shape.pages, shape.filled)))

    def measure(self, progress: Callable[[int, int], None]) -> Profile:
        """Median seconds of every shape of step."""
        shape = self._shape
        most = self._most
        counts = sorted({min(most, 2**k) for k in range(most.bit_length() + 1)}, reverse=True)
        done, total = 0, len(counts) + 3

        def median(make: Callable[[], Plan]) -> float:
            nonlocal done
            times = [self._time(make()) for _ in range(REPEATS)]
            done += 1
            progress(done, total)
            return statistics.median(times)

        # Full prompts first: they fill the pages that others read.
        table = [(count, median(partial(self._prefill, count, 0))) for count in counts]
        by_rows = dict(table)
        rows = max(n for n in counts if n <= min(DECODES, shape.slots))
        pages = max(1, min(64, (self._longest - 1) // shape.page_size))
        short = median(lambda: self._decodes(rows, 1))
        sample = (short - by_rows[rows]) / max(1, rows - 1)
        long = median(lambda: self._decodes(rows, pages))
        page = (long - short) / (rows * max(1, pages - 1))
        chunk = max(n for n in counts if n <= CHUNK)
        before = max(0, min(64, (self._longest - chunk) // shape.page_size))
        later = median(lambda: self._prefill(chunk, before))
        prefill_page = (later - by_rows[chunk]) / (chunk * max(1, before))
        return Profile.measured(table, sample, page, prefill_page)

    def was_disturbed(self, kept: Profile) -> bool:
        """Whether small steps take much less than when `kept` was measured: something else ran
        then. That they take more says nothing, since something else may run now."""
        self._time(self._prefill(1, 0))  # a first step is slow
        return any(
            SLOWER * self._time(self._prefill(count, 0)) < seconds
            for count, seconds in zip(kept.rows, kept.row_seconds, strict=True)
            if count <= CHECKED
        )

    def _time(self, plan: Plan) -> float:
        plan.busy = self._busy
        start = time.perf_counter()
        self._run(plan)
        return time.perf_counter() - start

    def _sequence(self, slot: int, tokens: int) -> Sequence:
        # Rows of one token would all go through the same experts.
        vocab = self._shape.vocab_size
        request = Request(
            id="profile",
            prompt_ids=tuple((7919 * n + 104729 * slot) % vocab for n in range(tokens)),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=1,
            seed=0,
            arrival=0.0,
        )
        sequence = Sequence(request, 0, fingerprint=b"")
        pages = -(-(tokens + 1) // self._shape.page_size)
        sequence.pages = [next(self._next_page) for _ in range(pages)]
        if windows := self._shape.window_pages:
            sequence.window_pages = [page % windows for page in sequence.pages]
        sequence.slot = slot
        return sequence

    def _prefill(self, count: int, pages_before: int) -> Plan:
        start = pages_before * self._shape.page_size
        sequence = self._sequence(0, start + count)
        return Plan(0, chunks=[Chunk(sequence, start, count, 1, True)], admitted=[sequence])

    def _decodes(self, rows: int, pages: int) -> Plan:
        length = min(pages * self._shape.page_size, self._longest) - 1
        sequences = [self._sequence(slot, max(1, length)) for slot in range(rows)]
        chunks = [Chunk(s, len(s.tokens) - 1, 1, 1, True) for s in sequences]
        return Plan(0, chunks=chunks, admitted=sequences)


def load_or_measure(
    file: Path | None,
    run: Callable[[Plan], object],
    shape: Shape,
    progress: Callable[[int, int], None],
    *,
    busy: bool = False,
) -> Profile:
    """The profile that an earlier start on this machine and build has kept, or a new one, if there
    is none or the machine was busy with something else then.

    A folder that cannot be read or written costs the next start a second, and is logged.
    """
    profiler = Profiler(run, shape, busy=busy)
    if file is None:
        return profiler.measure(progress)
    try:
        if file.exists():
            kept = msgspec.json.decode(file.read_bytes(), type=Profile)
            if not profiler.was_disturbed(kept):
                return kept
            logger.info("the machine was busy when it was measured; it is measured again")
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("the profile in %s is measured again: %s", file.parent, error)
    profile = profiler.measure(progress)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(msgspec.json.encode(profile))
        part.replace(file)
    except OSError as error:
        logger.warning("the profile of this machine cannot be kept: %s", error)
    return profile
