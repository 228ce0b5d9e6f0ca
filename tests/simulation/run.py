"""Episodes one after another, each from a seed of its own, so that a failing one replays alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from tests.mock import byte_tokenizer
from tests.simulation.clock import VirtualLoop
from tests.simulation.world import World, live

EPISODE_STEPS = 2000


class Broken(Exception):
    """An invariant does not hold; the message says how to see it again."""


@dataclass
class Report:
    """What was run, and how requests ended."""

    steps: int = 0
    episodes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


def simulate(steps: int, seed: int, episodes: int | None = None) -> Report:
    """Run at least `steps` steps, in episodes with the seeds from `seed` on. Raises Broken."""
    report, tokenizer = Report(), byte_tokenizer()
    while report.steps < steps and (episodes is None or report.episodes < episodes):
        this = seed + report.episodes
        world = World(random.Random(this))
        length = min(EPISODE_STEPS, steps)
        try:
            with asyncio.Runner(loop_factory=VirtualLoop) as runner:
                loop = runner.get_loop()
                assert isinstance(loop, VirtualLoop)
                report.steps += runner.run(live(loop, world, tokenizer, length))
        except (AssertionError, ExceptionGroup) as error:
            raise Broken(
                f"{error}\nsee it again: python -m tests.simulation --seed {this} --episodes 1 "
                f"--steps {length}"
            ) from error
        report.episodes += 1
        report.outcomes.update(world.outcomes)
    return report
