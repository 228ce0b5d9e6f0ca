"""What steps take on this machine: measured once, found again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.execution.profile import Profiler, Shape, load_or_measure
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


def test_an_earlier_starts_measurement_is_taken(tmp_path: Path) -> None:
    runs: list[Plan] = []
    file = tmp_path / "deep" / "profile.json"
    first = load_or_measure(file, runs.append, SHAPE, lambda *_: None)
    assert runs
    runs.clear()
    assert load_or_measure(file, runs.append, SHAPE, lambda *_: None) == first
    assert not runs


def test_more_memory_is_not_measured_again() -> None:
    """Memory that is left when a server starts decides how many pages there are."""
    assert with_pages(400).measured == with_pages(40_000).measured
    assert plans_of(with_pages(400).measured) == plans_of(with_pages(40_000))
    # Where a full context does not fit, it does make a difference.
    assert with_pages(8).measured != with_pages(400).measured
    assert plans_of(with_pages(8).measured) == plans_of(with_pages(8))
