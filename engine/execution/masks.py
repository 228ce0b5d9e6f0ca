"""Which tokens each slot's grammar allows next, worked out while the device computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par

from engine.errors import InvalidRequest
from engine.scheduling.sequence import Sequence as ScheduledSequence
from engine.text.grammar import GrammarCompiler
from engine.types import Grammar
from kernels.batch import Int32, Sampling

logger = logging.getLogger("ryzanstein.engine")


@dataclass(slots=True, eq=False)
class Held:
    """One slot's grammar: the mask of what may come next once `ready`, or why it is lost."""

    mask: Int32
    ready: Future[None]
    matcher: LLMatcher | None = None
    fault: str = ""


class Masks:
    """Matchers by slot. All but `enter` is called by the thread that runs steps.

    Work is done by threads of its own: one begins, which may have to compile; one follows what is
    drawn. A matcher is only ever touched by one of them, in order.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._words = -(-compiler.vocab_size // 32)
        self._slots: dict[int, Held] = {}
        self._executor = LLExecutor(1)
        self._begins = ThreadPoolExecutor(1, thread_name_prefix="ryzanstein-grammar")
        self._follows = ThreadPoolExecutor(1, thread_name_prefix="ryzanstein-mask")

    def enter(self, sequence: ScheduledSequence) -> None:
        """Start over at the sequence's slot; whatever was held there is forgotten."""
        self._slots.pop(sequence.slot, None)
        grammar = sequence.request.sampling.grammar
        if grammar is None:
            return
        held = Held(np.full((1, self._words), -1, np.int32), Future())
        drawn = sequence.tokens[sequence.prompt_length :]
        held.ready = self._begins.submit(self._begin, held, grammar, drawn)
        self._slots[sequence.slot] = held

    def held(self, slot: int) -> Held | None:
        """What a slot has; None without a grammar."""
        return self._slots.get(slot)

    def apply(
        self, sampling: Sampling, rows: Sequence[tuple[int, Held]]
    ) -> tuple[Sampling, dict[int, str]]:
        """The sampling with the masks of its `rows`, once they are there, and why rows have none:
        these must not be used."""
        if not rows:
            return sampling, {}
        for ready in {held.ready for _, held in rows}:
            ready.result()
        faults = {row: held.fault for row, held in rows if held.fault}
        masks = np.concatenate([held.mask for _, held in rows])
        return replace(sampling, mask_rows=[row for row, _ in rows], masks=masks), faults

    def drew(self, rows: Sequence[tuple[int, Held]], ids: Sequence[int]) -> None:
        """Work out what may follow the tokens that a step drew, `ids` of all its rows."""
        if rows:
            drawn = [(held, ids[row]) for row, held in rows]
            future = self._follows.submit(self._follow, drawn)
            for held, _ in drawn:
                held.ready = future

    def close(self) -> None:
        """Wait for what is under way, and end."""
        self._begins.shutdown()
        self._follows.shutdown()

    def _begin(self, held: Held, grammar: Grammar, drawn: Sequence[int]) -> None:
        try:
            held.matcher = self._compiler.matcher(grammar)
            held.matcher.consume_tokens(list(drawn))
            self._fill([held])
        except InvalidRequest as error:
            held.fault = str(error)
        except Exception as error:
            # It ends its own request, not the step that it is in.
            logger.error("a grammar cannot be followed", exc_info=error)
            held.fault = f"the answer's grammar cannot be followed: {type(error).__name__}"

    def _follow(self, drawn: Sequence[tuple[Held, int]]) -> None:
        # What has matched all of its grammar goes on only because its end is not known yet.
        going, tokens = list[Held](), list[tuple[LLMatcher, int]]()
        for held, token in drawn:
            if held.matcher is not None and not held.matcher.is_stopped():
                going.append(held)
                tokens.append((held.matcher, token))
        if going:
            consume_token_par(self._executor, tokens)
            self._fill(going)

    def _fill(self, all_held: Sequence[Held]) -> None:
        """The masks, and whether a matcher has come to its limits."""
        masks = np.zeros((len(all_held), self._words), np.int32)
        matchers = [(h.matcher, row) for row, h in enumerate(all_held) if h.matcher is not None]
        if matchers:
            fill_next_token_bitmask_par(self._executor, matchers, masks)
        for row, held in enumerate(all_held):
            held.mask = masks[row : row + 1]
            if held.matcher is not None and held.matcher.is_error():
                reason = held.matcher.get_error().partition("\n<")[0].strip()[:300]
                held.fault = f"the answer's grammar cannot be followed any further: {reason}"
