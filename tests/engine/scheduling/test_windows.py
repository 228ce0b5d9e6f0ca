"""Window pages: what sequences hold of them, and where others can begin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Move, Plan, StepResult
from engine.scheduling.room import NO_PAGES
from engine.scheduling.window_pages import NONE, WindowPages, least_window_pages
from tests.audit import audit
from tests.engine.scheduling.bench import SIZE, Bench, counts, generated
from tests.engine.scheduling.test_scheduler import SchedulerMachine
from tests.mock import continuation

WINDOW = 10
PROMPT = list(range(50))


def bench(windows: int = 30, pages: int = 64, **options: Any) -> Bench:
    chosen = {"budget": 64, "running": 8} | options
    beside = WindowPages(windows, WINDOW, SIZE, pages, chosen["budget"])
    return Bench(pages, **chosen, windows=beside)


def windows_of(house: Bench) -> WindowPages:
    windows = house.scheduler.pool.windows
    assert windows is not None
    return windows


def test_a_token_sees_the_pages_that_its_window_reaches() -> None:
    windows = WindowPages(8, window=6, page_size=4, pages=8)
    assert [windows.first(position) for position in (0, 5, 8, 9, 13)] == [0, 0, 0, 1, 2]
    assert windows.most == 3
    assert WindowPages(8, window=1, page_size=4, pages=8).most == 1


def test_the_longest_unheld_goes_first_and_what_is_spared_last() -> None:
    windows = WindowPages(3, WINDOW, SIZE, pages=9)
    first, second, third = windows.attach([4, 5, 6])
    assert windows.free == 0
    windows.let_go([second, first])
    windows.hold(5)
    windows.let_go([second])
    assert (windows.used, windows.free) == (1, 2)
    assert windows.attach([7]) == [first], "that of page 5 was used later"
    assert (windows.beside(4), windows.beside(5)) == (NONE, second)
    windows.let_go([third, first])
    windows.spared = {5}.__contains__
    assert windows.attach([8, 0]) == [third, first]
    assert windows.evictions == 3
    windows.audit([[third, first]])


def test_a_blank_page_has_nothing_beside_it() -> None:
    windows = WindowPages(4, WINDOW, SIZE, pages=4)
    pool = PagePool(4, SIZE, windows=windows)
    pages = pool.allocate(2)
    assert pages is not None
    held = [windows.beside(page) for page in pages]
    pool.publish(pages[0], b"a")
    windows.let_go(held)
    pool.release(pages)
    assert (windows.beside(pages[0]), windows.beside(pages[1])) == (held[0], NONE)
    pool.forget()
    assert windows.beside(pages[0]) == NONE
    assert windows.free == pool.free == 4


def test_content_is_found_where_it_is_whole() -> None:
    windows = WindowPages(1, WINDOW, SIZE, pages=4)
    pool = PagePool(4, SIZE, windows=windows)
    (old,) = pool.allocate(1) or []
    pool.publish(old, b"a")
    windows.let_go([windows.beside(old)])
    assert pool.is_whole(b"a")
    assert pool.allocate(2) is None, "one window page is not two"
    (new,) = pool.allocate(1) or []
    assert not pool.is_whole(b"a")
    pool.publish(new, b"a")
    assert pool.match([b"a"]) == [new]
    pool.release([old])
    assert pool.used == 1
    pool.audit([[new], [new]])


def test_a_long_answer_holds_a_window_only() -> None:
    house = bench()
    (sequence,) = house.add(PROMPT, max_tokens=100, ignore_eos=True)
    while house.scheduler.has_work:
        house.step()
        assert windows_of(house).used <= -(-len(PROMPT) // SIZE)
        if sequence.computed > 60:
            assert windows_of(house).used <= windows_of(house).most + 1
    assert generated(sequence) == continuation(PROMPT, 100)


def test_who_goes_on_from_an_answer_needs_its_last_window_only() -> None:
    house = bench(windows=14)
    (first,) = house.add(PROMPT, max_tokens=30, ignore_eos=True)
    house.drain()
    assert windows_of(house).evictions > 0
    (second,) = house.add([*first.tokens, 1, 2])
    house.step()
    assert second.cached == (len(first.tokens) - 1) // SIZE * SIZE
    assert second.window_pages[0] == NONE
    house.drain()


def test_a_beginning_whose_window_has_gone_is_computed_once_more() -> None:
    house = bench(windows=14)
    house.add(PROMPT, max_tokens=30, ignore_eos=True)
    house.drain()
    (second,) = house.add([*PROMPT[:20], *[90] * 9])
    assert counts(house.step()) == [29]
    assert second.cached == 0
    house.drain()
    (third,) = house.add([*PROMPT[:20], *[80] * 9])
    house.step()
    assert third.cached == 20, "what the second computed is the one that is found"
    house.drain()
    assert generated(third) == continuation([*PROMPT[:20], *[80] * 9], 4)


def test_a_repeated_prompt_copies_its_last_page_with_what_lies_beside_it() -> None:
    house = bench()
    first, second = house.add(PROMPT, n=2)
    house.step()
    plan = house.step()
    assert [kind for kind, _, _ in plan.moves] == [Move.COPY, Move.COPY_WINDOW]
    assert second.cached == len(PROMPT) - 1
    house.drain()
    assert generated(first) == generated(second)


def test_nobody_enters_for_whose_window_there_is_no_room() -> None:
    house = bench(windows=least_window_pages(WINDOW, 16, SIZE), budget=16)
    for n in range(6):
        house.add([100 * n + m for m in range(12)], max_tokens=40, ignore_eos=True)
    plan = house.step()
    assert [d.reason for d in plan.decisions if d.kind == "wait"] == [NO_PAGES]
    assert len(house.scheduler.running) == 3, "13 window pages are enough for three of 4"
    house.drain()
    assert house.scheduler.preemptions == 0
    assert house.scheduler.pool.used == windows_of(house).used == 0


@pytest.mark.parametrize("spare", range(8))
def test_a_long_prompt_beside_an_answer_is_read_once(spare: int) -> None:
    """However few window pages there are, steps in flight do not make it give way to itself."""
    windows = WindowPages(least_window_pages(40, 16, SIZE) + spare, 40, SIZE, 160, 16)
    house = Bench(160, 16, 2, windows=windows)
    (answer,) = house.add([5, 6, 7], max_tokens=100, ignore_eos=True)
    for _ in range(60):
        house.step()
    prompt = list(range(180))
    (reader,) = house.add(prompt)
    flying: list[tuple[Plan, StepResult]] = []
    while house.scheduler.has_work:
        plan = house.scheduler.plan()
        if not plan.is_empty:
            flying.append((plan, house.execute(plan)))
        if len(flying) == 2 or plan.is_empty:
            house.scheduler.commit(*flying.pop(0))
        audit(house.scheduler)
    assert house.scheduler.preemptions == 0
    assert generated(answer) == continuation([5, 6, 7], 100)
    assert generated(reader) == continuation(prompt, 4)


def test_what_a_failed_step_should_have_restored_is_not_there() -> None:
    house = bench(windows=16, pages=16, cold_slots=40, running=2)
    for n in (0, 1, 2):
        house.add([100 * n + m for m in range(50)])
        house.drain()
    house.add(list(range(50)))
    plan = house.scheduler.plan()
    assert Move.RESTORE_WINDOW in [kind for kind, _, _ in plan.moves]
    for lost in house.scheduler.discard(plan):
        house.scheduler.finish(lost, "error")
    audit(house.scheduler)
    (again,) = house.add(list(range(50)))
    plan = house.step()
    assert again.cached == 0
    house.drain()
    assert generated(again) == continuation(list(range(50)), 4)


def test_the_cold_tier_is_read_no_further_than_there_is_room() -> None:
    house = bench(windows=30, pages=30, cold_slots=80, running=3)
    for n in range(4):
        house.add([100 * n + m for m in range(80)])
        house.drain()
    (holder,) = house.add([5, 6, 7] * 13, max_tokens=80, ignore_eos=True)
    while len(holder.pages) < 16:
        house.step()
    (reader,) = house.add(list(range(80)))
    restored = 0
    while not reader.generated:
        restored += sum(kind is Move.RESTORE for kind, _, _ in house.step().moves)
    assert restored <= 20, "no page is read twice"
    house.drain()
    assert generated(reader) == continuation(list(range(80)), 4)


def test_the_cold_tier_keeps_what_lies_beside_its_pages() -> None:
    house = bench(windows=16, pages=16, cold_slots=40, running=2)
    house.add(PROMPT)
    house.drain()
    for n in (1, 2):
        house.add([100 * n + m for m in range(50)])
        house.drain()
    (again,) = house.add(PROMPT)
    plan = house.step()
    kinds = [kind for kind, _, _ in plan.moves]
    assert again.cached >= 48
    assert kinds.count(Move.RESTORE) > kinds.count(Move.RESTORE_WINDOW) > 0
    house.drain()
    assert generated(again) == continuation(PROMPT, 4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_paused_request_goes_on_from_its_window(shared: bool) -> None:
    house = bench(windows=24, prefix_caching=shared)
    (sequence,) = house.add(PROMPT, max_tokens=30, ignore_eos=True)
    for _ in range(10):
        house.step()
    house.scheduler.pause(sequence)
    house.add([7] * 40, max_tokens=20)
    house.drain()
    house.scheduler.unpause(sequence)
    plan = house.step()
    assert (sum(counts(plan)) < 10) == shared
    house.drain()
    assert generated(sequence) == continuation(PROMPT, 30)


def test_all_is_blank_when_what_was_computed_is_lost() -> None:
    house = bench()
    house.add(PROMPT)
    house.drain()
    assert windows_of(house).free == 30
    house.scheduler.prefixes.forget()
    assert all(windows_of(house).beside(page) == NONE for page in range(64))


class WindowedMachine(SchedulerMachine):
    """The same with layers that see a window, and few pages for it."""

    def __init__(self) -> None:
        super().__init__()
        windows = WindowPages(least_window_pages(6, 7, SIZE) + 1, 6, SIZE, 10)
        self.bench = Bench(pages=10, budget=7, running=3, cold_slots=6, windows=windows)
        self.bench.expect_short_outputs()


class TestWindowedMachine(WindowedMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
