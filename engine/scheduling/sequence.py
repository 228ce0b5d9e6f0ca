"""A sequence: one choice of one request, as the scheduler sees it."""

from __future__ import annotations

import bisect
from enum import Enum
from typing import TYPE_CHECKING

from engine.scheduling.pages import chain, chain_root
from engine.types import Request, TokenLogprob

if TYPE_CHECKING:
    from engine.scheduling.tenants import Account


# Fewer tokens than these at a page's beginning are computed again rather than copied.
LEAST_BEGINNING = 4


class State(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


class Sequence:
    """Mutable state of one choice; there are no phases.

    `computed` positions are in the cache; `scheduled` runs ahead of it while steps are under way;
    both chase `len(tokens)`. A `decoding` sequence has one position left to compute, and its token
    may still be on its way: the device knows it before `tokens` does. `horizon` is the position at
    which it needs another page, or has drawn its last token.
    """

    __slots__ = (
        "account",
        "admitted_at",
        "cached",
        "charged",
        "computed",
        "decoding",
        "ends",
        "entered_at",
        "final_length",
        "finish_reason",
        "hashes",
        "horizon",
        "index",
        "logprobs",
        "order",
        "pages",
        "preemptions",
        "prompt_length",
        "prompt_logprobs",
        "published",
        "request",
        "root",
        "scheduled",
        "seed",
        "shared",
        "slot",
        "state",
        "stop_reason",
        "tokens",
        "wants_logprobs",
        "wants_prompt_logprobs",
        "window_pages",
        "window_start",
    )

    def __init__(self, request: Request, index: int, *, fingerprint: bytes) -> None:
        self.request = request
        self.index = index
        self.seed = (request.seed + index) % 2**64
        sampling = request.sampling
        self.wants_logprobs = sampling.logprobs is not None
        # Whether every prompt position has to be computed and scored.
        self.wants_prompt_logprobs = sampling.prompt_logprobs is not None
        self.tokens = list(request.prompt_ids)
        self.prompt_length = len(self.tokens)
        self.final_length = self.prompt_length + request.max_tokens
        # Tokens at which the sequence may end.
        self.ends = frozenset[int]() if sampling.ignore_eos else request.eos_token_ids
        if sampling.stop_token_ids:
            self.ends |= frozenset(sampling.stop_token_ids)
        self.account: Account
        # Where it stands among its tenant's, least first; set when it is queued.
        self.order: tuple[float, ...] = ()
        self.computed = 0
        self.scheduled = 0
        self.decoding = False
        self.horizon = 0
        self.cached = 0
        # Prompt positions up to here have been paid for, or were found.
        self.charged = 0
        self.pages: list[int] = []
        # What lies beside each page, where there is such; held from number `window_start` on.
        self.window_pages: list[int] = []
        self.window_start = 0
        # Leading pages that were found, not computed.
        self.shared = 0
        self.root = chain_root(request.namespace, fingerprint)
        self.hashes: list[bytes] = []
        self.published = 0
        self.slot = -1
        self.state = State.WAITING
        self.preemptions = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None
        # When it was first let in, and when since it was last set aside.
        self.admitted_at: float | None = None
        self.entered_at: float | None = None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]

    @property
    def generated(self) -> int:
        """Tokens made so far."""
        return len(self.tokens) - self.prompt_length

    def enter(self, slot: int, now: float) -> None:
        """It takes a slot."""
        self.state, self.slot = State.RUNNING, slot
        self.admitted_at = now if self.admitted_at is None else self.admitted_at
        self.entered_at = now if self.entered_at is None else self.entered_at

    def leave(self) -> None:
        """It has neither slot nor pages any more, and nothing that lay in them."""
        self.slot, self.pages, self.decoding = -1, [], False
        self.window_pages, self.window_start = [], 0
        self.computed = self.scheduled = self.horizon = self.published = self.shared = 0

    def charge(self, start: int, end: int) -> None:
        """Its tenant pays for the tokens of the prompt from `start` to `end`, each once."""
        read = min(end, self.prompt_length)
        if read > self.charged:
            self.account.take_input(read - max(start, self.charged))
            self.charged = read

    def page_hash(self, number: int, page_size: int) -> bytes:
        """The name of full page `number`."""
        while len(self.hashes) <= number:
            start = len(self.hashes) * page_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(chain(parent, self.tokens[start : start + page_size]))
        return self.hashes[number]

    def name_of(self, number: int, length: int, page_size: int) -> bytes:
        """The name of page `number` of the first `length` tokens, which may end within it."""
        if (number + 1) * page_size <= length:
            return self.page_hash(number, page_size)
        parent = self.page_hash(number - 1, page_size) if number else self.root
        return chain(parent, self.tokens[number * page_size : length])

    def beginnings(self, number: int, page_size: int, most: int) -> list[tuple[int, bytes]]:
        """How many of the first tokens of page `number`, fewer than all and `most` at most, and the
        name of such a beginning: quarters of a page, the longest first."""
        step, start = max(LEAST_BEGINNING, page_size // 4), number * page_size
        longest = min(page_size - 1, most) // step * step
        return [
            (count, self.name_of(number, start + count, page_size))
            for count in range(longest, 0, -step)
        ]


def by_order(sequence: Sequence) -> tuple[float, ...]:
    """The key by which lists of sequences are kept sorted."""
    return sequence.order


def take_out(ordered: list[Sequence], sequence: Sequence) -> None:
    """Remove a sequence from a list sorted by `by_order`; several may have one order."""
    place = bisect.bisect_left(ordered, sequence.order, key=by_order)
    while ordered[place] is not sequence:
        place += 1
    del ordered[place]
