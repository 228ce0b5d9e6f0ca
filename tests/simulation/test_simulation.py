"""The simulator: it holds, it replays, and it notices what it is there to notice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.scheduling.pages import PagePool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.tenants import Account
from engine.scheduling.window_pages import WindowPages
from tests.simulation.run import Broken, simulate

STEPS = 200_000


def test_every_invariant_holds_for_200_000_steps() -> None:
    """In a process of its own, since measuring coverage would double the time."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    command = [sys.executable, "-m", "tests.simulation", "--steps", str(STEPS), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= STEPS


def test_a_seed_replays_exactly() -> None:
    first, second = (simulate(1500, seed=7, episodes=1) for _ in range(2))
    assert (first.steps, first.outcomes) == (second.steps, second.outcomes)
    assert first.outcomes["served"] > 50


def broken_publish(self: PagePool, page: int, digest: bytes, *_: object) -> None:
    self._by_name[b"any" * 6] = page
    self._names[page] = (b"any" * 6,)


def broken_release(self: PagePool, pages: list[int]) -> None:
    for page in pages:
        self._references[page] -= 1


def broken_first(self: WindowPages, position: int) -> int:
    return max(0, position - self.window + 1 + self.page_size) // self.page_size


def broken_input(self: Account, tokens: int) -> None:
    self.counter += 100 * tokens * (self.tenant.id == "a")


def broken_admission(self: Scheduler, plan: object) -> None:
    """Whoever waits goes on waiting."""


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (PagePool, "publish", broken_publish),
        (PagePool, "release", broken_release),
        (WindowPages, "first", broken_first),
        (Account, "take_input", broken_input),
        (Scheduler, "_admit", broken_admission),
    ],
    ids=[
        "a name for every page",
        "pages that are lost",
        "windows too short",
        "unfair service",
        "lost requests",
    ],
)
def test_what_is_wrong_is_noticed_with_its_seed(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: object
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Broken, match=r"--seed \d+ --episodes 1"):
        simulate(20_000, seed=3)
