"""Who may enter, who runs next, and who makes room: key functions and admission rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import InvalidRequest, Overloaded
from engine.scheduling.sequence import Sequence
from engine.types import Request


@dataclass(frozen=True)
class Limits:
    """What one engine holds. `context` bounds prompt plus output, and always fits the pool."""

    context: int
    max_waiting: int
    max_waiting_tokens: int


def waiting_key(sequence: Sequence) -> tuple[int, float]:
    """Order of admission: higher priority first, then first come, first served."""
    return (-sequence.request.priority, sequence.request.arrival)


def victim_key(sequence: Sequence) -> tuple[int, float, int]:
    """Order of preemption, least first: lowest priority, then the latest arrival."""
    return (sequence.request.priority, -sequence.request.arrival, -sequence.index)


def check_length(prompt_tokens: int, max_tokens: int | None, limits: Limits) -> int:
    """The request's output budget. Raises InvalidRequest if it can never fit."""
    if prompt_tokens >= limits.context:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens, but the context holds {limits.context} "
            "including at least one token of output; shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )
    room = limits.context - prompt_tokens
    if max_tokens is not None and max_tokens > room:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but the "
            f"context holds {limits.context}; ask for at most {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens


def admit(request: Request, waiting: Iterable[Sequence], limits: Limits) -> None:
    """Raises Overloaded if the queue is full."""
    queued = list(waiting)
    if len(queued) + request.sampling.n > limits.max_waiting:
        raise Overloaded(
            f"{len(queued)} sequences are waiting, the limit is {limits.max_waiting}; retry later",
            retry_after=1.0,
        )
    tokens = sum(len(s.tokens) for s in queued) + len(request.prompt_ids) * request.sampling.n
    if queued and tokens > limits.max_waiting_tokens:
        raise Overloaded(
            f"{tokens} tokens would be waiting, the limit is {limits.max_waiting_tokens}; "
            "retry later",
            retry_after=1.0,
        )
