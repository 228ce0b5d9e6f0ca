"""A scheduler with the mock model behind it, moved by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.scheduling.cost import Profile
from engine.scheduling.plan import Plan, StepResult
from engine.scheduling.sequence import Sequence
from engine.types import Request, SamplingParams
from tests.audit import audit
from tests.mock import EOS, MockExecutor, mock_scheduler, next_token

SIZE = 4
# A row takes a millisecond, whatever it is.
LINEAR = Profile((1, 1001), (0.001, 1.001), 0.0, 0.0, 0.0)


class Clock:
    """Time that a test moves by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class Bench:
    """A scheduler with the mock model behind it."""

    def __init__(
        self,
        pages: int = 16,
        budget: int = 16,
        running: int = 4,
        choose: Callable[[list[int]], int] = next_token,
        size: int = SIZE,
        **options: Any,
    ) -> None:
        self.clock = Clock()
        self.scheduler = mock_scheduler(
            pages, size, self.clock, step_tokens=budget, running=running, **options
        )
        self.executor = MockExecutor(pages, size, choose)
        self.count = 0

    def add(
        self, prompt: list[int], max_tokens: int = 4, *, n: int = 1, **options: Any
    ) -> list[Sequence]:
        self.count += 1
        fields = {k: options.pop(k) for k in list(options) if k in Request.__struct_fields__}
        request = Request(
            id=str(self.count),
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(n=n, **options),
            max_tokens=max_tokens,
            seed=0,
            arrival=fields.pop("arrival", float(self.count)),
            eos_token_ids=frozenset([EOS]),
            **fields,
        )
        sequences = [Sequence(request, index, fingerprint=b"") for index in range(n)]
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def execute(self, plan: Plan) -> StepResult:
        return self.executor.run(self.executor.fill(plan))

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        self.scheduler.commit(plan, self.execute(plan))
        audit(self.scheduler)
        return plan

    def drain(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")

    def expect_short_outputs(self) -> None:
        """As if all outputs so far had ended at once, so that too much is let in."""
        for _ in range(20):
            self.scheduler.lengths.record(1)


def generated(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.prompt_length :]


def counts(plan: Plan) -> list[int]:
    return [1] * len(plan.decodes) + [chunk.count for chunk in plan.chunks]
