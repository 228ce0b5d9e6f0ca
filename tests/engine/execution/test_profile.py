"""What steps take on this machine: measured once, found again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.execution.profile import Profiler, Shape, load_or_measure
from engine.scheduling.cost import Profile
from engine.scheduling.plan import Plan

SHAPE = Shape(step_tokens=64, slots=4, context=256, page_size=16, pages=400, vocab_size=100)


def with_pages(pages: int) -> Shape:
    return msgspec.structs.replace(SHAPE, pages=pages)


def plans_of(shape: Shape) -> list[tuple[list[int], list[int]]]:
    """Rows and pages of every step that is timed."""
    seen: list[tuple[list[int], list[int]]] = []

    def run(plan: Plan) -> None:
        pages = [page for chunk in plan.chunks for page in chunk.sequence.pages]
        seen.append(([chunk.count for chunk in plan.chunks], pages))

    Profiler(run, shape).measure(lambda *_: None)
    return seen


class Machine:
    """Takes a millisecond a row, or as many as it is `slowed` to, and remembers what it ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slowed = 1.0
        self.ran: list[int] = []
        self._now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self._now)

    def run(self, plan: Plan) -> None:
        rows = sum(chunk.count for chunk in plan.chunks)
        self.ran.append(rows)
        self._now += 1e-3 * rows * self.slowed

    def start(self, file: Path) -> Profile:
        self.ran.clear()
        return load_or_measure(file, self.run, SHAPE, lambda *_: None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_an_earlier_starts_measurement_is_taken(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "profile.json"
    first = machine.start(file)
    assert dict(zip(first.rows, first.row_seconds, strict=True))[16] == pytest.approx(0.016)
    assert max(machine.ran) == 64
    assert machine.start(file) == first
    # A look at small steps is all that it takes.
    assert machine.ran == [1, 1, 2, 4, 8, 16]


def test_what_was_measured_while_the_machine_was_busy_is_measured_again(
    machine: Machine, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    machine.slowed = 2.0
    disturbed = machine.start(file)
    machine.slowed = 1.0
    quiet = machine.start(file)
    assert quiet.row_seconds == pytest.approx([s / 2 for s in disturbed.row_seconds])
    assert machine.start(file) == quiet


def test_a_machine_that_is_busy_now_keeps_what_a_quiet_one_took(
    machine: Machine, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    quiet = machine.start(file)
    machine.slowed = 3.0
    assert machine.start(file) == quiet


def test_more_memory_is_not_measured_again() -> None:
    """Memory that is left when a server starts decides how many pages there are."""
    assert with_pages(400).measured == with_pages(40_000).measured
    assert plans_of(with_pages(400).measured) == plans_of(with_pages(40_000))
    # Where a full context does not fit, it does make a difference.
    assert with_pages(8).measured != with_pages(400).measured
    assert plans_of(with_pages(8).measured) == plans_of(with_pages(8))
