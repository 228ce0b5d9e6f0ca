"""The values that travel between the engine's parts and its users."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from engine.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


class Grammar(msgspec.Struct, frozen=True):
    """What an answer has to match, in one of these notations: a JSON schema (its JSON is `text`), a
    regular expression (Rust's), a choice (a JSON list of texts), llguidance's Lark, or llama.cpp's
    GBNF."""

    kind: Literal["json_schema", "regex", "choice", "lark", "gbnf"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """The JSON texts that a schema describes."""
        return cls("json_schema", json.dumps(schema))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to continue a prompt. `validate` raises InvalidRequest naming the field.

    `max_tokens` None means as many as the context holds. `temperature` 0 is greedy. `top_k` 0 and
    `top_p` 1 are off. `logprobs` k asks for the chosen token's logprob and the k best, of the
    model's raw distribution. `seed` fixes the draw whatever else is in the batch. What is drawn
    follows `grammar`; an answer that ends by itself matches all of it.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def validate(self, vocab_size: int) -> None:
        """Check every range. `vocab_size` bounds token ids."""
        self._check_numbers()
        for token in (*self.logit_bias, *self.stop_token_ids):
            param = "logit_bias" if token in self.logit_bias else "stop_token_ids"
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"{param} names token {token}, but ids run from 0 to {vocab_size - 1}",
                    param=param,
                )
        for value in self.logit_bias.values():
            _in_range("logit_bias", value, -100, 100)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed",
                param="stop",
            )
        if any(not s for s in self.stop):
            raise InvalidRequest("stop holds an empty string; remove it", param="stop")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            param = "min_tokens" if self.min_tokens else "ignore_eos"
            raise InvalidRequest(f"{param} cannot be combined with a grammar", param=param)

    def _check_numbers(self) -> None:
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, None)
        _in_range("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}",
                param="min_tokens",
            )
        _in_range("temperature", self.temperature, 0, 2)
        _in_range("top_k", self.top_k, -1, 2**31 - 1)
        _in_range("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InvalidRequest(
                "top_p is 0; use a value above 0, or temperature 0 for the likeliest token",
                param="top_p",
            )
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _in_range("n", self.n, 1, MAX_CHOICES)
        if self.seed is not None:
            _in_range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _in_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    @property
    def has_penalties(self) -> bool:
        """Whether the history of tokens changes the distribution."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _in_range(name: str, value: float, low: float, high: float | None) -> None:
    if not (low <= value and (high is None or value <= high)) or math.isnan(value):
        span = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise InvalidRequest(f"{name} is {value}; it must be {span}", param=name)


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a request is, and when it is due; times are seconds, counted from its arrival.

    Higher `priority` runs first, within its tenant. A `deadline` that passes ends the request with
    DeadlineExceeded: the whole answer's, or the first token's. `target_itl` is the time between
    tokens that others' prompts may not exceed while it runs; 0 takes the engine's. Tenants with
    different `namespace` share no pages of the cache. `trace` is W3C's `traceparent`, passed on.
    Requests of one `lease` go on from each other: what has ended keeps its pages for the next,
    until `AsyncEngine.end_lease`, or for `cache.lease_seconds`.
    """

    tenant: str = ""
    namespace: bytes = b""
    priority: int = 0
    deadline: float = math.inf
    first_token_deadline: float = math.inf
    target_itl: float = 0.0
    trace: str = ""
    lease: str = ""

    @property
    def is_patient(self) -> bool:
        """Whether nobody waits for it: a negative priority says so."""
        return self.priority < 0


DEFAULT_TERMS = Terms()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that has been tokenized and checked. Higher `priority` runs first.

    Deadlines are clock seconds: the whole answer's, and its first token's. `target_itl` is the
    time between tokens that others' prompts may not exceed while it runs; 0 takes the engine's.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    seed: int
    arrival: float
    priority: int = 0
    deadline: float = math.inf
    first_token_deadline: float = math.inf
    target_itl: float = 0.0
    tenant: str = ""
    namespace: bytes = b""
    trace: str = ""
    lease: str = ""
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def due(self) -> float:
        """The earlier of its deadlines."""
        return min(self.deadline, self.first_token_deadline)

    @property
    def is_patient(self) -> bool:
        """See `Terms`."""
        return self.priority < 0


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's logprob, and the best alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class QueueProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request stands that has not begun: sequences before it, about how many seconds they
    take, and why the first of its tenant waits."""

    position: int
    seconds: float
    reason: str


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant may still ask for now: a limit, what is left of it, and the seconds until all
    of it is there again; for sequences in the queue, and for tokens."""

    requests: int
    requests_left: int
    requests_reset: float
    tokens: int
    tokens_left: int
    tokens_reset: float


class Delta(msgspec.Struct, kw_only=True, gc=False):
    """What happened to one choice since the last delta.

    `text` is everything newly decided; `token_ids` and `logprobs` are of the tokens that became
    known, which may run ahead of the text while a stop string could still be forming.
    `finish_reason` ("stop", "length" or "abort") comes with the choice's last delta, `usage` with
    the request's last.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None

    def merge(self, later: Delta) -> None:
        """Append what came later; nothing is lost by coalescing."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs = later.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = later.finish_reason or self.finish_reason
        self.stop_reason = later.stop_reason if self.stop_reason is None else self.stop_reason
        self.usage = later.usage or self.usage


class Decision(msgspec.Struct, frozen=True):
    """One act of the scheduler: what it did to which choice of which request, why, and when (clock
    seconds)."""

    kind: str
    request_id: str
    reason: str
    at: float
    index: int = 0


class Ran(msgspec.Struct, frozen=True):
    """A piece of a prompt that a step computed for a choice: `count` tokens from `start` on, and
    whether its end drew the next token."""

    request_id: str
    start: int
    count: int
    sample: bool
    index: int = 0


class Served(Protocol):
    """A choice that a step computed something for; it may have ended while the step ran."""

    request: Request
    index: int
    finish_reason: str | None


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One step: what ran, what it was predicted to take and took (seconds by part), and what the
    pool looks like after it.

    `gaps` are the seconds between the tokens that it gave and those before them in their choices,
    with how many came after each; while a request is set aside, nobody waits for its next token.
    A `busy` step was computed with the model's narrower weights.
    `served` are those that it computed anything for. Of the `drafted` tokens that were guessed so
    many were `accepted`.
    """

    step: int
    at: float
    prefill_tokens: int
    decode_rows: int
    predicted: float
    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    pages_total: int
    preemptions: int
    seconds: dict[str, float]
    drafted: int = 0
    accepted: int = 0
    decisions: tuple[Decision, ...] = ()
    prefills: tuple[Ran, ...] = ()
    gaps: dict[float, int] = {}
    busy: bool = False
    served: Sequence[Served] = ()


class Choice(msgspec.Struct, frozen=True):
    """One answer to a request: its tokens so far, and when (clock seconds) and why it ended; None
    while it runs."""

    index: int
    completion_tokens: int
    finished: float | None = None
    finish_reason: str | None = None


class RequestStats(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request; times are clock seconds, None where it never got that far."""

    id: str
    tenant: str
    arrival: float
    first_scheduled: float | None
    first_token: float | None
    finished: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int
    finish_reason: str
    trace: str = ""
    choices: tuple[Choice, ...] = ()


class Clock(Protocol):
    """Where time comes from; the simulator brings its own."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class Listener(Protocol):
    """Receives statistics on the event loop; must return at once and never raise."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_request(self, stats: RequestStats) -> None: ...
