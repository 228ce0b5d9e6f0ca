"""A model in place, on one rank in this process or on several in others, ready to run steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from engine.config import Config
from engine.execution.memory import CacheSize, cache_size
from engine.execution.parallel import RankStepper
from engine.execution.profile import Shape
from engine.execution.rank import Rank, RankFacts
from engine.execution.stepper import Stepper, stepper_for
from engine.scheduling.plan import Plan, StepResult
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from engine.weights.checkpoint import Checkpoint

Timeline = list[tuple[str, float]]


@dataclass(frozen=True)
class Device:
    """What a scheduler drives. `run` runs one step while nothing else does; `facts` are those of
    each rank; `buffers` are bytes of activations; `compiler` is for its grammars; `snapshots` are
    places for states."""

    stepper: Stepper
    run: Callable[[Plan], StepResult]
    facts: Sequence[RankFacts]
    shape: Shape
    buffers: int
    compiler: GrammarCompiler
    snapshots: int


def place_model(
    config: Config,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None],
    timeline: Timeline,
) -> Device:
    """Load the weights and allocate the cache; seconds go to `timeline`. Raises ConfigError."""
    if config.execution.tensor_parallel > 1:
        return _place_on_ranks(config, checkpoint, tokenizer, progress, timeline)
    with stage(timeline, "weights"):
        rank = Rank(config, checkpoint, None, progress)
    with stage(timeline, "cache"):
        size = size_for(config, [rank.facts])
        compiler = GrammarCompiler(lambda: tokenizer, rank.facts.vocab_size)
        runner = rank.allocate(size, compiler)
    return Device(
        stepper_for(runner),
        lambda plan: runner.run(runner.fill(plan)),
        [rank.facts],
        step_shape(config, rank.facts, size.pages),
        runner.buffer_bytes(),
        compiler,
        size.snapshots,
    )


def size_for(config: Config, facts: Sequence[RankFacts]) -> CacheSize:
    """The size of the cache, which all ranks have a part of. Raises ConfigError if no page fits."""
    section, running, first = config.cache, config.scheduler.max_running, facts[0]
    if first.free is None:
        page, state = sum(rank.page for rank in facts), sum(rank.state for rank in facts)
        return cache_size(section, page, first.context, running, state_bytes=state)
    sizes = [
        cache_size(section, rank.page, rank.context, running, rank.free, rank.state)
        for rank in facts
    ]
    return CacheSize(min(s.pages for s in sizes), min(s.snapshots for s in sizes))


def step_shape(config: Config, facts: RankFacts, pages: int) -> Shape:
    """What steps can be made of."""
    size, batch = config.cache.page_size, config.scheduler
    context = min(facts.context, pages * size)
    vocab = facts.vocab_size
    return Shape(batch.max_batch_tokens, batch.max_running, context, size, pages, vocab)


def _place_on_ranks(
    config: Config,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None],
    timeline: Timeline,
) -> Device:
    with stage(timeline, "ranks"):
        stepper = RankStepper(
            config,
            str(checkpoint.path),
            partial(size_for, config),
            progress,
        )
    facts = stepper.facts
    timeline.append(("weights, slowest rank", max(rank.seconds for rank in facts)))
    size = stepper.size
    shape = step_shape(config, facts[0], size.pages)
    compiler = GrammarCompiler(lambda: tokenizer, facts[0].vocab_size)
    return Device(stepper, stepper.run, facts, shape, stepper.buffers, compiler, size.snapshots)


@contextmanager
def stage(timeline: Timeline, name: str) -> Iterator[None]:
    """Note how long something takes."""
    start = time.perf_counter()
    yield
    timeline.append((name, time.perf_counter() - start))
