"""Steps that are ready to run."""

from __future__ import annotations

from dataclasses import dataclass

from engine.execution.masks import Held
from engine.scheduling.plan import Move
from kernels.backend import Program
from kernels.batch import Batch, Sampling
from kernels.steps import Step


@dataclass(frozen=True)
class StagingShape:
    """What the staging buffers hold at most. The page behind the pool's last one takes what is
    written for nobody, as does that behind the window pages. `states` says whether the model keeps
    some."""

    slots: int
    pages: int
    pages_per_sequence: int
    page_size: int
    vocab_size: int
    states: bool = False
    window_pages: int = 0


@dataclass(slots=True)
class Filled:
    """A step that is ready to run on `program`. The tokens of the first `fed` rows are those last
    drawn at their slots; `drawn` are the logits rows that draw, for `slots`, `held` those with a
    grammar."""

    batch: Batch
    sampling: Sampling
    fed: int
    drawn: list[int]
    slots: list[int]
    moves: list[tuple[Move, int, int]]
    held: list[tuple[int, Held]]
    program: Program


@dataclass(slots=True)
class Queued:
    """A step that a device's queue runs on `program` by itself. `fill_seconds` is what it took to
    get it ready."""

    step: Step
    program: Program
    fill_seconds: float = 0.0
