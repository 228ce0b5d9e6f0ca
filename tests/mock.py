"""A model without weights: a byte tokenizer, and tokens that depend on the KV pages' content."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.config import PolicyName
from engine.engine import AsyncEngine
from engine.execution.masks import Held, Masks
from engine.execution.stepper import ThreadStepper
from engine.parts import Parts
from engine.scheduling.admission import Limits
from engine.scheduling.budget import SchedulerLimits
from engine.scheduling.cold import ColdIndex
from engine.scheduling.cost import FLAT, CostModel, Profile
from engine.scheduling.pages import PagePool
from engine.scheduling.plan import Chunk, Move, Plan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.snapshots import Snapshots
from engine.scheduling.window_pages import WindowPages
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer, byte_alphabet
from engine.types import Clock, MonotonicClock

EOS = 256
VOCAB = 257
INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def byte_backend(*more: str) -> Backend:
    """A tokenizer whose ids are bytes, plus one special end token, and `more` of them."""
    vocab = byte_alphabet()
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<eos>", *more]
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return backend


def byte_tokenizer(chat_template: str | None = CHAT, *more: str) -> Tokenizer:
    return Tokenizer(
        byte_backend(*more), eos_token="<eos>", eos_token_ids=[EOS], chat_template=chat_template
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


@dataclass
class MockFilled:
    """What a step needs that the plan may not say any more when it runs."""

    plan: Plan
    decodes: list[tuple[int, list[int], int]]
    chunks: list[tuple[int, list[int], list[int], Chunk]]
    held: dict[int, Held]


def allowed(mask: np.ndarray[Any, Any], token: int) -> int:
    """The token if a mask allows it, else one that brings the text to its end."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    ends = [token, EOS, *b'"}],:e0']
    return next((t for t in ends if t < len(bits) and bits[t]), int(bits.argmax()))


def input_of(chunk: Chunk) -> list[int]:
    """A sequence's tokens as a chunk sees them."""
    tokens = chunk.sequence.tokens
    return [*tokens[: chunk.start], *chunk.given] if chunk.given else list(tokens)


class MockExecutor:
    """Keeps token ids where a model keeps keys and values, and reads its context from there."""

    def __init__(
        self,
        pages: int,
        page_size: int,
        choose: Callable[[list[int]], int],
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self.page_size = page_size
        self.kv = np.full((pages, page_size), -1, np.int64)
        self.cold: dict[int, np.ndarray[Any, Any]] = {}
        self.choose = choose
        self.delay = 0.0
        self.error: Exception | None = None
        self.plans: list[Plan] = []
        self._last: dict[int, int] = {}
        self._compiler = compiler
        self._masks: Masks | None = None

    def fill(self, plan: Plan) -> MockFilled:
        self.plans.append(plan)
        for sequence in plan.admitted:
            if self._masks is None and sequence.request.sampling.grammar is not None:
                self._masks = Masks(self._compiler)  # most mocks need no threads for it
            if self._masks is not None:
                self._masks.enter(sequence)
        decodes = [(s.slot, list(s.pages), s.scheduled - 1) for s in plan.decodes]
        chunks = [(c.sequence.slot, list(c.sequence.pages), input_of(c), c) for c in plan.chunks]
        held = {}
        for slot in [d[0] for d in decodes] + [c[0] for c in chunks if c[3].sample]:
            if self._masks is not None and (found := self._masks.held(slot)) is not None:
                held[slot] = found
        return MockFilled(plan, decodes, chunks, held)

    def run(self, filled: MockFilled) -> StepResult:
        time.sleep(self.delay)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        for kind, source, target in filled.plan.moves:
            self._move(kind, source, target)
        # All is written before anything is read, as in a model's layer.
        for slot, pages, position in filled.decodes:
            self._write(pages, position, self._last[slot])
        for _, pages, tokens, chunk in filled.chunks:
            if chunk.write:
                for position in range(chunk.start, chunk.start + chunk.count):
                    self._write(pages, position, tokens[position])
        ids: list[int] = []
        rows: list[tuple[int, Held]] = []
        for slot, pages, position in filled.decodes:
            rows += [(len(ids), held)] if (held := filled.held.get(slot)) else []
            ids.append(self._draw(slot, pages, position + 1, held))
        for slot, pages, tokens, chunk in filled.chunks:
            end = chunk.start + chunk.count
            for position in range(end - chunk.rows, end):
                last = bool(chunk.given) or (position == end - 1 and chunk.sample)
                held = filled.held.get(slot) if last else None
                rows += [(len(ids), held)] if held else []
                drawn = self._draw(slot, pages, position + 1, held) if last else None
                ids.append(tokens[position + 1] if drawn is None else drawn)
            if chunk.given and not chunk.sample:
                del self._last[slot]  # nobody knows yet which of them counts
        faults = {row: held.fault for row, held in rows if held.fault}
        if self._masks is not None:
            self._masks.drew(rows, ids)
        logprobs: list[float | None] = [-0.5] * len(ids)
        top = [[(i, -0.5), (0, -1.5)] for i in ids]
        seconds = {"forward": 0.0, "sample": 0.0, "move": 0.0}
        return StepResult(ids, logprobs, top, seconds, faults)

    def close(self) -> None:
        if self._masks is not None:
            self._masks.close()

    def _draw(self, slot: int, pages: list[int], end: int, held: Held | None = None) -> int:
        whole = self.kv[pages[: -(-end // self.page_size)]].reshape(-1)[:end].tolist()
        assert min(whole) >= 0, "a position is read that nobody wrote"
        self._last[slot] = self.choose(whole)
        if held is not None:
            held.ready.result()
            self._last[slot] = allowed(held.mask[0], self._last[slot])
        return self._last[slot]

    def _write(self, pages: list[int], position: int, token: int) -> None:
        page, offset = divmod(position, self.page_size)
        self.kv[pages[page], offset] = token

    def _move(self, kind: Move, source: int, target: int) -> None:
        if kind is Move.COPY:
            self.kv[target] = self.kv[source]
        elif kind is Move.DEMOTE:
            self.cold[target] = self.kv[source].copy()
        elif kind is Move.RESTORE:
            self.kv[target] = self.cold[source]
        elif kind is Move.DISCARD:
            self.kv[source] = -1  # and it has no states that could be resumed


def mock_scheduler(
    pages: int,
    page_size: int,
    clock: Clock,
    *,
    step_tokens: int = 32,
    running: int = 8,
    cold_slots: int = 0,
    eviction: PolicyName = "lru",
    profile: Profile = FLAT,
    busy_profile: Profile | None = None,
    snapshots: int | None = None,
    windows: WindowPages | None = None,
    **limits: Any,
) -> Scheduler:
    """The real scheduler over a small pool, for a model that keeps states if there are places for
    `snapshots` of them, or whose layers have `windows`."""
    return Scheduler(
        PagePool(pages, page_size, eviction, windows),
        SchedulerLimits(step_tokens, running, **limits),
        clock,
        CostModel(profile, busy_profile),
        cold=ColdIndex(cold_slots, 1.0),
        snapshots=None if snapshots is None else Snapshots(running, snapshots),
    )


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
    look_ahead: bool = True,
    infill: bool = False,
    speculative_tokens: int = 0,
) -> tuple[AsyncEngine, MockExecutor]:
    """An engine around the mock model; the real loop, scheduler, pages and streams."""
    compiler = GrammarCompiler(byte_tokenizer, VOCAB)
    executor = MockExecutor(pages, page_size, choose, compiler)

    def parts() -> Parts:
        clock = MonotonicClock()
        return Parts(
            model_name="mock",
            tokenizer=byte_tokenizer(chat_template, *(INFILL if infill else ())),
            vocab_size=VOCAB + len(INFILL if infill else ()),
            scheduler=mock_scheduler(
                pages,
                page_size,
                clock,
                step_tokens=max_batch_tokens,
                running=max_running,
                speculative_tokens=speculative_tokens,
            ),
            stepper=ThreadStepper(executor),
            limits=Limits(min(context, pages * page_size), max_waiting, max_waiting_tokens),
            fingerprint=b"mock",
            compiler=compiler,
            clock=clock,
        )

    engine = AsyncEngine(parts, seeds=lambda: 7, stall_seconds=stall_seconds, look_ahead=look_ahead)
    return engine, executor
