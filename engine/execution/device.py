"""A model in place, on one rank in this process or on several in others, ready to run steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from engine.config import Config
from engine.execution.memory import CacheSize, Footprint, cache_size
from engine.execution.parallel import RankStepper
from engine.execution.profile import Shape
from engine.execution.queued import QueuedStepper
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
    each rank; `buffers` are bytes of activations; `compiler` is for its grammars."""

    stepper: Stepper
    run: Callable[[Plan], StepResult]
    facts: Sequence[RankFacts]
    shape: Shape
    buffers: int
    compiler: GrammarCompiler
    size: CacheSize


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
        stepper_for(runner) if runner.queue is None else QueuedStepper(runner),
        lambda plan: runner.run(runner.fill(plan)),
        [rank.facts],
        step_shape(config, rank.facts, size),
        runner.buffer_bytes(),
        compiler,
        size,
    )


def size_for(config: Config, facts: Sequence[RankFacts]) -> CacheSize:
    """The size of the cache, which all ranks have a part of. Raises ConfigError if no page fits."""
    section, batch, context = config.cache, config.scheduler, facts[0].context
    if facts[0].free is None:
        return cache_size(section, whole_footprint(facts), context, batch)
    sizes = [cache_size(section, rank.footprint, context, batch, rank.free) for rank in facts]
    # Who has room for all without windows has it with them.
    least = min(sizes, key=lambda size: (size.pages, not size.window_pages))
    return replace(least, snapshots=min(size.snapshots for size in sizes))


def whole_footprint(facts: Sequence[RankFacts]) -> Footprint:
    """What all ranks keep together."""
    parts = [rank.footprint for rank in facts]
    return Footprint(
        page=sum(part.page for part in parts),
        window_page=sum(part.window_page for part in parts),
        window=parts[0].window,
        state=sum(part.state for part in parts),
    )


def step_shape(config: Config, facts: RankFacts, cache: CacheSize) -> Shape:
    """What steps can be made of."""
    size, batch = config.cache.page_size, config.scheduler
    return Shape(
        step_tokens=batch.max_batch_tokens,
        slots=batch.max_running,
        context=min(facts.context, cache.pages * size),
        page_size=size,
        pages=cache.pages,
        vocab_size=facts.vocab_size,
        window_pages=cache.window_pages,
    )


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
    shape = step_shape(config, facts[0], size)
    compiler = GrammarCompiler(lambda: tokenizer, facts[0].vocab_size)
    return Device(stepper, stepper.run, facts, shape, stepper.buffers, compiler, size)


@contextmanager
def stage(timeline: Timeline, name: str) -> Iterator[None]:
    """Note how long something takes."""
    start = time.perf_counter()
    yield
    timeline.append((name, time.perf_counter() - start))
