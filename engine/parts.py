"""What an engine runs on, whoever loads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config import Config
from engine.execution.memory import Budget
from engine.execution.stepper import Stepper
from engine.scheduling.admission import Limits
from engine.scheduling.scheduler import Scheduler
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from engine.types import Clock, MonotonicClock
from engine.weights.sources import Progress


@dataclass
class Parts:
    """What an `AsyncEngine` runs on."""

    model_name: str
    tokenizer: Tokenizer
    vocab_size: int
    scheduler: Scheduler
    stepper: Stepper
    limits: Limits
    fingerprint: bytes
    compiler: GrammarCompiler
    clock: Clock = field(default_factory=MonotonicClock)
    device: str = ""
    generates: bool = True
    """Whether there is a model that answers prompts; without one `model_name` is the encoder's."""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams` for what a request leaves out."""
    timeline: list[tuple[str, float]] = field(default_factory=list)
    """Start-up stages and their seconds."""
    budget: Budget | None = None
    upkeep: Callable[[], bool] = lambda: False
    """Adjusts the cache to the memory that is left; True if a step has to give some back."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.scheduler.pool.total * self.scheduler.pool.page_size


def load_parts(
    config: Config,
    *,
    progress: Progress = lambda *_: None,
    accept_terms: Callable[[str], bool] = lambda _: False,
) -> Parts:
    """See `loading.load`. With it comes torch, whose import takes two seconds: not for a command's
    help, and a server's port is open by then."""
    start = time.perf_counter()
    from engine.loading import load

    libraries = time.perf_counter() - start
    parts = load(config, progress=progress, accept_terms=accept_terms)
    parts.timeline.insert(0, ("libraries", libraries))
    return parts
