"""Steps that a device runs one behind another, without Python in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kernels.backend import Program
from kernels.batch import Batch, Int32, Int64, Sampling


@dataclass(frozen=True)
class Tables:
    """What lasts from step to step, by slot: `pages` int32 `[slots, pages per sequence]` as in
    `Batch`, `windows` the same or None; `seeds` uint64 `[slots]` of draws, see `counter_uniform`;
    `last_ids` int64 `[slots]`, the token last drawn at each."""

    pages: Int32
    windows: Int32 | None
    page_size: int
    seeds: npt.NDArray[np.uint64]
    last_ids: Int64


Copy = tuple[int, int, bool]
"""From which page to which; whether they are window pages."""


class Step(Protocol):
    """A step that is ready to run; nothing that it was made of is needed any more."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> tuple[list[int], float, float, float]:
        """What its logits rows drew, and the seconds of copying pages, of the forward pass and of
        choosing. Raises what it raised."""
        ...


class StepQueue(Protocol):
    """Runs steps in order, each as soon as the one before it has ended."""

    def step(
        self,
        batch: Batch,
        sampling: Sampling,
        fed: int,
        drawn: Sequence[int],
        slots: Sequence[int],
        copies: Sequence[Copy] = (),
    ) -> Step:
        """A step whose logits rows all draw, of their models' own logits, without logprobs.

        The first `fed` rows take the token last drawn at their slot (`batch.table_rows`); what the
        logits rows `drawn` draw stays at `slots`. Pages are copied before anything is computed.
        """
        ...

    def following(self, step: Step) -> Step:
        """The step after one that only decodes, one token further."""
        ...

    def submit(self, step: Step, program: Program, told: int) -> None:
        """Run a step on a program of the queue's device; when it has ended, `told`, a file
        descriptor, gets a byte. Both must last until then. Thread-safe."""
        ...

    def drain(self) -> None:
        """Wait until all steps have ended."""
        ...

    def close(self, seconds: float) -> bool:
        """Wait until all steps have ended, and take no more; False if they take longer."""
        ...


@runtime_checkable
class QueueProgram(Program, Protocol):
    """A program whose device has such a queue, for this program and others."""

    def queue(self, tables: Tables) -> StepQueue:
        """A queue over these tables."""
        ...
