"""What a step drew becomes part of its sequences."""

from __future__ import annotations

from collections.abc import Callable

from engine.scheduling.plan import Chunk, Plan, StepResult, score_prompt
from engine.scheduling.prefixes import Prefixes
from engine.scheduling.sequence import Sequence, State
from engine.scheduling.speculate import Speculator

Finish = Callable[[Sequence, str, int | None], None]


class Committer:
    """Adds tokens to the live sequences of a plan, and ends those whose last one it was."""

    def __init__(self, prefixes: Prefixes, speculator: Speculator, finish: Finish) -> None:
        self._prefixes = prefixes
        self._speculator = speculator
        self._finish = finish

    def decodes(self, plan: Plan, result: StepResult) -> list[Sequence]:
        """One token each."""
        size, dropped, ids = self._prefixes.pool.page_size, plan.dropped, result.ids
        moved = []
        # Tokens that were drawn for one account, in a row: most have the same.
        account, drawn = None, 0
        for row, sequence in enumerate(plan.decodes):
            if dropped and sequence in dropped:
                continue
            token, tokens = ids[row], sequence.tokens
            length = len(tokens)
            sequence.computed = length
            if not length % size:
                self._prefixes.filled(sequence)
            moved.append(sequence)
            if (
                token in sequence.ends
                or length + 1 >= sequence.final_length
                or sequence.wants_logprobs
            ):
                self._append(sequence, result, row)
            else:
                tokens.append(token)
                if sequence.account is not account:
                    if account is not None:
                        account.take_output(drawn)
                    account, drawn = sequence.account, 0
                drawn += 1
        if account is not None:
            account.take_output(drawn)
        return moved

    def prompt(self, chunk: Chunk, result: StepResult, first: int) -> bool:
        """A part of a prompt, and the token that follows it if that was drawn."""
        sequence = chunk.sequence
        sequence.computed = chunk.start + chunk.count
        self._prefixes.publish(sequence)
        if sequence.wants_prompt_logprobs:
            score_prompt(chunk, result, first)
        if chunk.sample:
            self._prefixes.publish_tail(sequence)
            self._append(sequence, result, first + chunk.rows - 1)
        return chunk.sample

    def given(self, chunk: Chunk, result: StepResult, first: int) -> int:
        """As many tokens as were guessed right, and the one after them; how many were right."""
        sequence, guess = chunk.sequence, chunk.given[1:]
        right = 0
        while True:
            sequence.computed = len(sequence.tokens)
            self._prefixes.filled(sequence)
            self._append(sequence, result, first + right)
            if sequence.state is State.FINISHED or right == len(guess):
                break
            if result.ids[first + right] != guess[right]:
                break
            right += 1
        if guess and sequence.state is State.RUNNING:
            # Places of wrong guesses are computed again.
            sequence.scheduled = sequence.computed
        self._speculator.learn(sequence, len(guess), right)
        return right

    def _append(self, sequence: Sequence, result: StepResult, row: int) -> None:
        """Add a drawn token, and finish the sequence if it ends there."""
        token, request = result.ids[row], sequence.request
        sampling = request.sampling
        sequence.tokens.append(token)
        sequence.account.take_output()
        generated = len(sequence.tokens) - sequence.prompt_length
        if sampling.logprobs is not None:
            sequence.logprobs.append(result.logprob(row))
        if generated >= sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return self._finish(sequence, "stop", token)
            if token in request.eos_token_ids and not sampling.ignore_eos:
                return self._finish(sequence, "stop", None)
        if generated >= request.max_tokens:
            self._finish(sequence, "length", None)
        return None
