"""What planning and committing a step costs, in pure Python: steady decodes of several batch sizes.

python -m perf.schedule --sequences 32,256
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from engine.scheduling.budget import Pace, SchedulerLimits
from engine.scheduling.cost import FLAT, CostModel
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Plan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.types import MonotonicClock, Request, SamplingParams

PAGE_SIZE = 16
PROMPT = 128


def make(sequences: int, tenants: int, steps: int) -> Scheduler:
    """A scheduler in which so many sequences, of several tenants, have all begun to decode."""
    pages = sequences * (PROMPT + steps + 64) // PAGE_SIZE
    at_once = Pace(target=10.0, longest=10.0)
    limits = SchedulerLimits(sequences + 4096, sequences, at_once, max_prefilling=sequences)
    scheduler = Scheduler(PagePool(pages, PAGE_SIZE), limits, MonotonicClock(), CostModel(FLAT))
    for number in range(sequences):
        request = Request(
            id=str(number),
            prompt_ids=tuple(range(number, number + PROMPT)),
            sampling=SamplingParams(),
            max_tokens=steps + 32,
            seed=0,
            arrival=float(number),
            tenant=f"tenant-{number % tenants}",
            eos_token_ids=frozenset([0]),
        )
        scheduler.add(Sequence(request, 0, fingerprint=b""))
    while len(scheduler.decoding) < sequences:
        plan = scheduler.plan()
        scheduler.commit(plan, result(plan))
    return scheduler


def result(plan: Plan) -> StepResult:
    """Tokens that end nothing."""
    rows = len(plan.decodes) + sum(chunk.rows for chunk in plan.chunks)
    return StepResult([7] * rows, [None] * rows, [], {})


def measure(sequences: int, tenants: int, steps: int, *, look_ahead: bool) -> dict[str, float]:
    """Medians in microseconds a step; the 99th percentile holds steps in which pages fill up."""
    scheduler = make(sequences, tenants, steps)
    plans: list[float] = []
    commits: list[float] = []
    flying = [scheduler.plan()] if look_ahead else []
    gc.disable()
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        flying.append(plan)
        oldest = flying.pop(0)
        outcome = result(oldest)
        begin = time.perf_counter()
        scheduler.commit(oldest, outcome)
        scheduler.observe(oldest, outcome, 0.02)
        end = time.perf_counter()
        plans.append(planned - start)
        commits.append(end - begin)
    gc.enable()
    both = sorted(p + c for p, c in zip(plans, commits, strict=True))
    return {
        "sequences": sequences,
        "plan_us": statistics.median(plans) * 1e6,
        "commit_us": statistics.median(commits) * 1e6,
        "both_us": statistics.median(both) * 1e6,
        "both_mean_us": statistics.mean(both) * 1e6,
        "both_p99_us": both[int(len(both) * 0.99)] * 1e6,
    }


app = App(name="perf.schedule", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    sequences: Annotated[str, Parameter(help="Comma-separated batch sizes.")] = "1,8,32,64,256",
    tenants: int = 4,
    steps: int = 400,
    look_ahead: bool = True,
) -> None:
    """Print one line a batch size."""
    rows = [
        measure(int(count), tenants, steps, look_ahead=look_ahead) for count in sequences.split(",")
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.0f}" for value in row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    app()
