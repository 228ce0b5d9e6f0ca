"""A model without weights: a byte tokenizer, and tokens that depend on the KV pages' content."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.engine import AsyncEngine
from engine.execution.stepper import ThreadStepper
from engine.loading import Parts
from engine.scheduling.pages import PagePool
from engine.scheduling.policy import Limits
from engine.scheduling.scheduler import Plan, Scheduler, SchedulerLimits, StepResult
from engine.text.tokenizer import Tokenizer, byte_alphabet
from engine.types import MonotonicClock

EOS = 256
VOCAB = 257
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def byte_backend() -> Backend:
    """A tokenizer whose ids are bytes, plus one special end token."""
    vocab = byte_alphabet()
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return backend


def byte_tokenizer(chat_template: str | None = CHAT) -> Tokenizer:
    return Tokenizer(
        byte_backend(), eos_token="<eos>", eos_token_ids=[EOS], chat_template=chat_template
    )


def next_token(context: Sequence[int]) -> int:
    """A lower-case letter that depends on every token before it."""
    return ord("a") + zlib.crc32(np.asarray(context, np.int64).tobytes()) % 26


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What the mock model generates after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class MockExecutor:
    """Keeps token ids where a model keeps keys and values, and reads its context from there."""

    def __init__(self, pages: int, page_size: int, choose: Callable[[list[int]], int]) -> None:
        self.page_size = page_size
        self.kv = np.full((pages, page_size), -1, np.int64)
        self.choose = choose
        self.delay = 0.0
        self.error: Exception | None = None
        self.plans: list[Plan] = []
        self._rows: list[list[int] | int] = []

    def fill(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._rows = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            for position in range(chunk.start, chunk.start + chunk.count):
                page, offset = divmod(position, self.page_size)
                self.kv[sequence.pages[page], offset] = sequence.tokens[position]
            end = chunk.start + chunk.count
            context = [
                int(self.kv[sequence.pages[i // self.page_size], i % self.page_size])
                for i in range(end)
            ]
            for position in range(end - chunk.rows, end):
                last = position == end - 1 and chunk.sample
                self._rows.append(context if last else sequence.tokens[position + 1])

    def run(self) -> StepResult:
        time.sleep(self.delay)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        ids = [row if isinstance(row, int) else self.choose(row) for row in self._rows]
        logprobs: list[float | None] = [-0.5] * len(ids)
        top = [[(i, -0.5), (0, -1.5)] for i in ids]
        return StepResult(ids, logprobs, top, {"forward": 0.0, "sample": 0.0})

    def close(self) -> None:
        pass


def mock_engine(
    *,
    pages: int = 64,
    page_size: int = 4,
    max_batch_tokens: int = 32,
    max_running: int = 8,
    context: int = 200,
    max_waiting: int = 1000,
    max_waiting_tokens: int = 100_000,
    choose: Callable[[list[int]], int] = next_token,
    chat_template: str | None = CHAT,
    stall_seconds: float = 30.0,
) -> tuple[AsyncEngine, MockExecutor]:
    """An engine around the mock model; the real loop, scheduler, pages and streams."""
    executor = MockExecutor(pages, page_size, choose)

    def parts() -> Parts:
        clock = MonotonicClock()
        limits = SchedulerLimits(max_batch_tokens, max_running, max_batch_tokens)
        return Parts(
            model_name="mock",
            tokenizer=byte_tokenizer(chat_template),
            vocab_size=VOCAB,
            scheduler=Scheduler(PagePool(pages, page_size), limits, clock),
            stepper=ThreadStepper(executor),
            limits=Limits(min(context, pages * page_size), max_waiting, max_waiting_tokens),
            fingerprint=b"mock",
            clock=clock,
        )

    return AsyncEngine(parts, seeds=lambda: 7, stall_seconds=stall_seconds), executor
