"""Loading with an encoder: beside a model that generates, or instead of one."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import Config
from engine.embedding.embedder import Embedder
from engine.errors import ConfigError, EngineFailed
from engine.execution.stepper import ThreadStepper
from engine.parts import Parts, load_parts
from engine.scheduling.admission import Limits
from engine.scheduling.budget import SchedulerLimits
from engine.scheduling.cost import CostModel, Profile
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Plan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.text.grammar import GrammarCompiler
from engine.types import MonotonicClock
from engine.weights.sources import Progress

# The model's name if there is none that generates.
NONE = "none"


def load_both(
    config: Config,
    embedder: Embedder | None,
    *,
    progress: Progress = lambda *_: None,
    accept_terms: Callable[[str], bool] = lambda _: False,
) -> Parts:
    """Load the encoder, if there is one, and the model. Raises ConfigError in one sentence."""
    if embedder is not None:
        embedder.load(progress=progress, accept_terms=accept_terms)
    if config.model.name != NONE:
        return load_parts(config, progress=progress, accept_terms=accept_terms)
    if embedder is None:
        raise ConfigError("without a model there has to be an encoder; add --embedding-model")
    return _without_model(config, embedder)


class _Nothing:
    """Executes no step: requests for one are refused before they are scheduled."""

    def fill(self, plan: Plan) -> None:
        raise EngineFailed("no model that generates has been loaded")

    def run(self, filled: None) -> StepResult:
        raise EngineFailed("no model that generates has been loaded")

    def close(self) -> None:
        pass


def _without_model(config: Config, embedder: Embedder) -> Parts:
    """An engine that refuses every prompt, so that all around it works as ever."""
    encoder, page = embedder.encoder, config.cache.page_size
    clock = MonotonicClock()
    limits = SchedulerLimits(config.scheduler.max_running + page, config.scheduler.max_running)
    cost = CostModel(Profile((1,), (0.0,), 0.0, 0.0, 0.0))
    tokenizer = encoder.tokenizer()
    return Parts(
        model_name=embedder.name,
        tokenizer=tokenizer,
        vocab_size=encoder.vocab_size,
        scheduler=Scheduler(PagePool(1, page), limits, clock, cost),
        stepper=ThreadStepper(_Nothing()),
        limits=Limits(encoder.max_tokens, 1, 1),
        fingerprint=b"",
        compiler=GrammarCompiler(lambda: tokenizer, encoder.vocab_size),
        clock=clock,
        device=f"{encoder.bytes / 1e6:.0f} MB of weights in float32",
        generates=False,
    )
