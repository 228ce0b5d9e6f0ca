"""A sequence: one choice of one request, as the scheduler sees it."""

from __future__ import annotations

from enum import Enum

from engine.scheduling.pages import chain, chain_root
from engine.types import Request, TokenLogprob


class State(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Mutable state of one choice. `computed` chases `len(tokens)`; there are no phases."""

    __slots__ = (
        "admitted_at",
        "cached",
        "computed",
        "finish_reason",
        "hashes",
        "index",
        "leader",
        "logprobs",
        "pages",
        "preemptions",
        "prompt_length",
        "prompt_logprobs",
        "published",
        "request",
        "root",
        "seed",
        "slot",
        "state",
        "stop_reason",
        "tokens",
        "wants_prompt_logprobs",
    )

    def __init__(
        self, request: Request, index: int, *, fingerprint: bytes, leader: Sequence | None = None
    ) -> None:
        self.request = request
        self.index = index
        self.seed = (request.seed + index) % 2**64
        # The first choice computes the prompt; the others wait to find its pages.
        self.leader = leader
        # Whether every prompt position has to be computed and scored.
        self.wants_prompt_logprobs = request.sampling.prompt_logprobs is not None
        self.tokens = list(request.prompt_ids)
        self.prompt_length = len(self.tokens)
        self.computed = 0
        self.cached = 0
        self.pages: list[int] = []
        self.root = chain_root(request.namespace, fingerprint)
        self.hashes: list[bytes] = []
        self.published = 0
        self.slot = -1
        self.state = State.WAITING
        self.preemptions = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None
        self.admitted_at: float | None = None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]

    @property
    def generated(self) -> int:
        """Tokens made so far."""
        return len(self.tokens) - self.prompt_length

    def page_hashes(self, count: int, page_size: int) -> list[bytes]:
        """Hashes of the first `count` full pages, extended as tokens arrive."""
        while len(self.hashes) < count:
            start = len(self.hashes) * page_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(chain(parent, self.tokens[start : start + page_size]))
        return self.hashes[:count]
