"""A queue of steps draws what the same steps draw one by one, and tells what fails."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.batch import Batch, Sampling, counter_uniform
from kernels.cpu.native_steps import NativeQueue
from kernels.steps import Step, Tables
from tests.kernels.native import chunks_batch, needs_native, program_of
from tests.kernels.test_sampling import options
from tests.tiny import write_llama

pytestmark = needs_native
SIZE, LENGTHS = 16, [13, 30, 5]
SLOTS = 8


class Line:
    """Three sequences at slots of a table, and a queue that takes them on."""

    def __init__(self, folder: Path, cache: str = "bfloat16", **changes: Any) -> None:
        path = write_llama(folder / "tiny", head_dim=32)
        made = (program_of(path, pages=64, cache=cache)[0] for _ in range(2))
        self.program, self.alone = made
        random = np.random.default_rng(3)
        pages = random.permutation(64)[: SLOTS * 8].reshape(SLOTS, 8).astype(np.int32)
        seeds = random.integers(0, 2**63, SLOTS, np.uint64)
        self.last = np.full(SLOTS, -7, np.int64)
        self.tables = Tables(pages, None, SIZE, seeds, self.last)
        self.queue: NativeQueue = self.program.queue(self.tables)
        self.slots = [5, 0, 3]
        self.prompts = [random.integers(0, 260, n).tolist() for n in LENGTHS]
        self.changes = changes
        self.read, self.write = os.pipe()

    def prompts_batch(self) -> Batch:
        """All prompts, the last row of each sampled."""
        batch = chunks_batch(self.prompts, [0] * 3, self.tables.pages[self.slots], SIZE)
        ends = batch.query_starts[1:].astype(np.int64) - 1
        rows = np.array(self.slots, np.int32)
        return replace(batch, table_rows=rows, page_table=self.tables.pages, sample_rows=ends)

    def sampling(self, lengths: list[int]) -> Sampling:
        """Draws for tokens at these places."""
        uniform = counter_uniform(self.tables.seeds[self.slots], np.array(lengths))
        return options(3, uniform=uniform, **self.changes)

    def first(self) -> Step:
        """The prompts as a step."""
        return self.queue.step(
            self.prompts_batch(), self.sampling(LENGTHS), 0, [0, 1, 2], self.slots
        )

    def decodes(self, lengths: list[int]) -> Step:
        """One token further, its inputs those last drawn."""
        batch = chunks_batch([[0]] * 3, lengths, self.tables.pages[self.slots], SIZE)
        rows = np.array(self.slots, np.int32)
        batch = replace(batch, table_rows=rows, page_table=self.tables.pages)
        sampling = self.sampling([n + 1 for n in lengths])
        return self.queue.step(batch, sampling, 3, [0, 1, 2], self.slots)

    def run(self, *steps: Step) -> list[list[int]]:
        """What they draw, all submitted before the first has ended."""
        for step in steps:
            self.queue.submit(step, self.program, self.write)
        self.queue.drain()
        assert os.read(self.read, 100) == b"\0" * len(steps)
        assert all(step.done for step in steps)
        return [step.result()[0] for step in steps]

    def one_by_one(self, count: int) -> list[list[int]]:
        """The same steps on the other program, each from what Python knows."""
        batch, lengths = self.prompts_batch(), LENGTHS
        drawn: list[list[int]] = []
        for _ in range(count):
            self.alone.forward(batch)
            drawn.append(self.alone.sample(self.sampling(lengths)).ids)
            tokens = [[token] for token in drawn[-1]]
            batch = chunks_batch(tokens, lengths, self.tables.pages[self.slots], SIZE)
            lengths = [n + 1 for n in lengths]
        return drawn


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"temperature": 1.5}, {"top_k": 9, "min_p": 0.01}]
)
def test_steps_draw_what_they_would_one_by_one(tmp_path: Path, changes: dict[str, float]) -> None:
    line = Line(tmp_path, **changes)
    steps = [line.first(), line.decodes(LENGTHS)]
    while len(steps) < 40:  # over several pages
        steps.append(line.queue.following(steps[-1]))
    drawn = line.run(*steps)
    assert drawn == line.one_by_one(40)
    assert line.last[line.slots].tolist() == drawn[-1]
    assert set(line.last[[1, 2, 4, 6, 7]]) == {-7}
    move, forward, sample = steps[-1].result()[1:]
    assert move == 0
    assert forward > 0
    assert sample > 0


def test_greedy_and_drawn_rows_mix(tmp_path: Path) -> None:
    line = Line(tmp_path, temperature=np.array([0.0, 1.0, 0.0], np.float32))
    steps = [line.first(), line.decodes(LENGTHS)]
    steps.append(line.queue.following(steps[-1]))
    assert line.run(*steps) == line.one_by_one(3)


@pytest.mark.parametrize("cache", ["bfloat16", "int8", "int4"])
def test_pages_are_copied_before_a_step_reads_them(tmp_path: Path, cache: str) -> None:
    line = Line(tmp_path, cache=cache, temperature=0.0)
    table = line.tables.pages
    # The second prompt lies in two pages; another slot begins with copies of them.
    copies = [(int(table[0, n]), int(table[6, n]), False) for n in range(2)]
    line.run(line.first())
    token, length = line.last[0], LENGTHS[1]
    both = chunks_batch([[token]] * 2, [length] * 2, table[[0, 6]], SIZE)
    both = replace(both, table_rows=np.array([0, 6], np.int32), page_table=table)
    step = line.queue.step(both, options(2, temperature=0.0), 0, [0, 1], [0, 6], copies)
    (drawn,) = line.run(step)
    assert drawn[0] == drawn[1] == line.one_by_one(2)[1][1]
    assert step.result()[1] > 0, "copying is timed"
    following = line.queue.following(step)
    line.run(following)
    assert following.result()[1] == 0, "and done once"


def test_what_fails_is_told_and_the_next_step_runs(tmp_path: Path) -> None:
    line = Line(tmp_path)
    tokens = [[1] * 513]
    wide = np.zeros((SLOTS, 40), np.int32)
    batch = chunks_batch(tokens, [0], wide[:1], SIZE)
    sampling = options(513)
    too_long = line.queue.step(batch, sampling, 0, [], [])
    step = line.first()
    for each in (too_long, step):
        line.queue.submit(each, line.program, line.write)
    line.queue.drain()
    with pytest.raises(ValueError, match="more rows than the program's buffers"):
        too_long.result()
    assert [step.result()[0]] == line.one_by_one(1)


def test_a_step_needs_nothing_of_what_it_was_made_of(tmp_path: Path) -> None:
    line = Line(tmp_path)
    batch, sampling = line.prompts_batch(), line.sampling(LENGTHS)
    step = line.queue.step(batch, sampling, 0, [0, 1, 2], line.slots)
    for array in (batch.token_ids, batch.positions, batch.kv_slots, sampling.temperature):
        array.fill(-1)
    assert line.run(step) == line.one_by_one(1)


def test_arrays_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    line = Line(tmp_path)
    batch, sampling = line.prompts_batch(), line.sampling(LENGTHS)
    make = line.queue.step
    for wrong in ({"positions": batch.positions[:-1]}, {"table_rows": batch.table_rows[:2]}):
        with pytest.raises(ValueError, match="do not belong together"):
            make(replace(batch, **wrong), sampling, 0, [0, 1, 2], line.slots)
    with pytest.raises(ValueError, match="do not belong together"):
        make(batch, options(2), 0, [0, 1, 2], line.slots)
    with pytest.raises(ValueError, match="do not belong together"):
        make(batch, sampling, 4, [0, 1, 2], line.slots)
    with pytest.raises(ValueError, match="no such logits row"):
        make(batch, sampling, 0, [0, 1, 3], line.slots)
    with pytest.raises(ValueError, match="values of another size"):
        make(replace(batch, positions=batch.positions.astype(np.int32)), sampling, 0, [], [])
    with pytest.raises(ValueError, match="only a step that decodes"):
        line.queue.following(line.first())


def test_closing_waits_for_what_is_there_and_takes_no_more(tmp_path: Path) -> None:
    line = Line(tmp_path)
    steps = [line.first(), line.decodes(LENGTHS)]
    for step in steps:
        line.queue.submit(step, line.program, line.write)
    assert line.queue.close(10.0)
    assert all(step.done for step in steps)
    with pytest.raises(RuntimeError, match="closed"):
        line.queue.submit(steps[0], line.program, line.write)
    assert line.queue.close(10.0)
    assert torch.equal(torch.tensor(steps[0].result()[0]), torch.tensor(line.one_by_one(1)[0]))
