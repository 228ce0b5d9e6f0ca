"""What a step will take: a profile measured at start, corrected by what steps have taken since."""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# How far corrections may lead away from the profile.
LOWEST, HIGHEST = 0.5, 2.0
# Steps of one kind whose median corrects the profile, and how many it takes to begin.
WINDOW, ENOUGH = 15, 5
ERRORS = 256


@dataclass(frozen=True)
class Profile:
    """Seconds. `rows` and `row_seconds` are a table by total rows, one of them sampled;
    `sample_seconds` for each further sampled row, `page_seconds` for each page that a decode reads,
    `prefill_page_seconds` for each pair of a prefill token and a page before its chunk."""

    rows: tuple[int, ...]
    row_seconds: tuple[float, ...]
    sample_seconds: float
    page_seconds: float
    prefill_page_seconds: float

    @staticmethod
    def measured(
        table: Sequence[tuple[int, float]], sample: float, page: float, prefill_page: float
    ) -> Profile:
        """From medians, forced monotone: more rows never take less."""
        rows, seconds = [], []
        highest = 0.0
        for count, value in sorted(table):
            highest = max(highest, value)
            rows.append(count)
            seconds.append(highest)
        slopes = (max(0.0, value) for value in (sample, page, prefill_page))
        return Profile(tuple(rows), tuple(seconds), *slopes)


# Of no machine: what is assumed where nothing was measured (a test, a simulation).
FLAT = Profile((1, 512), (0.002, 0.1), 0.0, 0.0, 0.0)


@dataclass(slots=True)
class Work:
    """What a step does, as far as its time depends on it."""

    decodes: int = 0
    pages: int = 0
    """That decodes read."""
    prefill: int = 0
    """Tokens of prompts."""
    sampled: int = 0
    """Rows of prompts that give logits."""
    prefill_pages: int = 0
    """Sum over prefill tokens of the pages before their chunk."""


class Corrected:
    """A profile, and what steps have taken since. Corrections are medians of recent ratios by kind
    of step, within 0.5 to 2 of the profile, so that one slow step moves nothing."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._ratios: dict[tuple[int, int], deque[float]] = {}
        self._corrections: dict[tuple[int, int], float] = {}
        self._overall = 1.0
        self._observed = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def predict(self, work: Work) -> float:
        """Seconds of a step that does `work`."""
        return self.raw(work) * self.correction(work)

    def correction(self, work: Work) -> float:
        """How many times what the profile says steps of this kind take now."""
        return self._corrections.get(_kind(work), self._overall)

    def prefill_seconds(self, tokens: int, step_tokens: int, page_size: int) -> float:
        """Seconds to compute a prompt alone, in steps of `step_tokens`."""
        whole, rest = divmod(tokens, step_tokens)
        # Pages before a step's tokens, on average of all steps but the last.
        pages = (whole - 1) * step_tokens // (2 * page_size)
        seconds = 0.0
        if whole:
            work = Work(prefill=step_tokens, prefill_pages=step_tokens * pages)
            seconds += whole * self.predict(work)
        if rest:
            pages = rest * (whole * step_tokens // page_size)
            seconds += self.predict(Work(prefill=rest, sampled=1, prefill_pages=pages))
        return seconds

    def learn(self, work: Work, ratio: float) -> None:
        """A step took so many times what the profile says."""
        kind = _kind(work)
        ratios = self._ratios.get(kind)
        if ratios is None:
            ratios = self._ratios[kind] = deque(maxlen=WINDOW)
        ratios.append(ratio)
        self._recent.append(ratio)
        self._observed += 1
        # The first few of a kind count at once; afterwards now and then is enough.
        if len(ratios) < WINDOW or self._observed % ENOUGH == 0:
            if len(ratios) >= ENOUGH:
                self._corrections[kind] = _clamp(statistics.median(ratios))
            if len(self._recent) >= ENOUGH:
                self._overall = _clamp(statistics.median(self._recent))

    def raw(self, work: Work) -> float:
        """What the profile says."""
        profile = self._profile
        rows = work.decodes + work.prefill
        if rows == 0:
            return 0.0
        sampled = work.decodes + work.sampled
        return (
            self._table(rows)
            + profile.sample_seconds * max(0, sampled - 1)
            + profile.page_seconds * work.pages
            + profile.prefill_page_seconds * work.prefill_pages
        )

    def _table(self, rows: int) -> float:
        """Between measured points, and on from the last ones, in straight lines."""
        counts, seconds = self._profile.rows, self._profile.row_seconds
        if len(counts) == 1:
            return seconds[0] * max(1.0, rows / counts[0])
        high = min(max(1, bisect.bisect_left(counts, rows)), len(counts) - 1)
        low = high - 1
        slope = (seconds[high] - seconds[low]) / (counts[high] - counts[low])
        return max(seconds[0], seconds[low] + slope * (rows - counts[low]))


class CostModel:
    """Predicts seconds a step, with the model's weights or, while it is `busy`, with those that it
    has for busy times, if it has any."""

    def __init__(self, profile: Profile, busy_profile: Profile | None = None) -> None:
        self.busy = False
        self.has_two = busy_profile is not None
        self.quiet = Corrected(profile)
        self._busy = self.quiet if busy_profile is None else Corrected(busy_profile)
        self._errors: deque[float] = deque(maxlen=ERRORS)

    def predict(self, work: Work) -> float:
        """Seconds of a step that does `work`."""
        return self._current.predict(work)

    def predict_quiet(self, work: Work) -> float:
        """The same with the weights of quiet times, at what the machine does now."""
        return self.quiet.raw(work) * self._current.correction(work)

    def decode_seconds(self, rows: int, pages: int) -> float:
        """Seconds of a step of `rows` decodes that read `pages`, and nothing else."""
        return self.predict(Work(decodes=rows, pages=pages))

    def prefill_seconds(self, tokens: int, step_tokens: int, page_size: int) -> float:
        """Seconds to compute a prompt alone, in steps of `step_tokens`."""
        return self._current.prefill_seconds(tokens, step_tokens, page_size)

    def token_seconds(self, step_tokens: int) -> float:
        """Seconds for each token of a prompt, in steps of `step_tokens`."""
        return self.predict(Work(prefill=step_tokens)) / step_tokens

    def observe(self, work: Work, seconds: float, *, busy: bool = False) -> None:
        """Learn from a step that has been run."""
        cost = self._busy if busy else self.quiet
        raw = cost.raw(work)
        if raw <= 0 or seconds <= 0:
            return
        self._errors.append(abs(raw * cost.correction(work) - seconds) / seconds)
        cost.learn(work, seconds / raw)

    @property
    def _current(self) -> Corrected:
        return self._busy if self.busy else self.quiet

    @property
    def median_error(self) -> float:
        """Median of |predicted - taken| / taken over recent steps."""
        return statistics.median(self._errors) if self._errors else 0.0


def _kind(work: Work) -> tuple[int, int]:
    """Steps that are corrected together."""
    return work.prefill.bit_length(), work.decodes.bit_length()


def _clamp(ratio: float) -> float:
    return min(max(ratio, LOWEST), HIGHEST)
