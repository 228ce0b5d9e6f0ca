"""Where a request's time went: every decision of the scheduler about it, with its reason.

The scheduler's decisions and the pieces of prompts that steps computed are kept by request, while
it runs and for an hour, each with the choice that it belongs to. A choice's segments are made from
its own when somebody asks, and leave no gap; but what was too much to be kept is not explained.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from engine import AsyncEngine, RequestStats, StepStats
from engine.types import Choice
from server.errors import HTTPError, json_response
from server.tenants import client_of

KEEP_SECONDS = 3600.0
KEPT = 10_000
# Of one request: a prompt of many pieces, or one that is preempted again and again, has a bound.
MOST_EVENTS = 2000
QUEUED, BATCH, PREFILL, DECODE = "queued", "in the batch", "prefill", "decode"
AWAY, ASIDE = "preempted", "set aside"
BEHIND = "others are before it"
ITS_TURN = "the step's time goes to others"


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a choice, from `at` to `end` (clock seconds)."""

    kind: str
    at: float
    end: float
    reason: str = ""
    tokens: int = 0
    sample: bool = False
    index: int = 0


class Segment(msgspec.Struct, omit_defaults=True):
    """A part of a choice's time, in milliseconds since its request arrived."""

    index: int
    what: str
    from_ms: float
    ms: float
    why: str = ""
    tokens: int = 0


class Told(msgspec.Struct):
    """One choice's time: how much there was of it, in milliseconds, and which share of that its
    segments explain."""

    choice: Choice
    total_ms: float
    explained: float
    segments: list[Segment]

    def summary(self) -> dict[str, object]:
        """All but the segments, which are listed for the request as a whole."""
        return {
            "index": self.choice.index,
            "finish_reason": self.choice.finish_reason,
            "completion_tokens": self.choice.completion_tokens,
            "total_ms": self.total_ms,
            "explained": self.explained,
        }


class Record(msgspec.Struct):
    """What is known of one request. Of choices that are `cut`, nothing was kept from then on."""

    events: list[Event] = []
    cut: dict[int, float] = {}
    stats: RequestStats | None = None


class Timelines:
    """A listener of one engine; the oldest that have ended are forgotten first."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._live: dict[str, Record] = {}
        self._ended: OrderedDict[str, Record] = OrderedDict()

    def on_step(self, stats: StepStats) -> None:
        """Note the decisions, and which prompts the step computed."""
        for decision in stats.decisions:
            at = decision.at
            event = Event(decision.kind, at, at, decision.reason, index=decision.index)
            self._note(decision.request_id, event)
        begun = stats.at - stats.seconds.get("wait", 0.0)
        for ran in stats.prefills:
            event = Event(PREFILL, begun, stats.at, "", ran.count, ran.sample, ran.index)
            self._note(ran.request_id, event)

    def on_request(self, stats: RequestStats) -> None:
        """A request has ended; it is kept for a while."""
        record = self._live.pop(stats.id, None) or Record()
        record.stats = stats
        self._ended[stats.id] = record
        oldest = stats.finished - KEEP_SECONDS
        while self._ended:
            first = next(iter(self._ended.values())).stats
            if len(self._ended) <= KEPT and (first is None or first.finished >= oldest):
                break
            self._ended.popitem(last=False)

    def record(self, request_id: str) -> Record | None:
        """What is known of a request; None if nothing is."""
        return self._live.get(request_id) or self._ended.get(request_id)

    def told(self, record: Record, arrival: float, choices: Sequence[Choice]) -> list[Told]:
        """The time of each choice, from its request's arrival to its end, or to now."""
        now = self._now()
        return [self._tell(record, arrival, choice, now) for choice in choices]

    def _tell(self, record: Record, arrival: float, choice: Choice, now: float) -> Told:
        index = choice.index
        end = now if choice.finished is None else choice.finished
        events = [event for event in record.events if event.index == index]
        known = min(end, record.cut.get(index, end))
        parts = segments(events, arrival, known, choice.completion_tokens, index)
        lasted, spent = 1e3 * (end - arrival), sum(part.ms for part in parts)
        explained = round(spent / lasted, 4) if lasted else 1.0
        return Told(choice, round(lasted, 3), explained, parts)

    def _note(self, request_id: str, event: Event) -> None:
        if (record := self._ended.get(request_id)) is None:
            record = self._live.setdefault(request_id, Record())
        if len(record.events) < MOST_EVENTS:
            record.events.append(event)
        else:
            record.cut.setdefault(event.index, event.at)


def segments(
    events: list[Event], arrival: float, end: float, tokens: int, index: int = 0
) -> list[Segment]:
    """A choice's events as parts of the time between arrival and end; `tokens` were generated."""
    made: list[Segment] = []
    at, what, why = arrival, QUEUED, BEHIND

    def close(until: float) -> None:
        nonlocal at
        until = min(max(until, at), end)
        if until > at:
            made.append(Segment(index, what, 1e3 * (at - arrival), 1e3 * (until - at), why))
        at = until

    for event in sorted(events, key=lambda e: e.at):
        close(event.at)
        match event.kind:
            case "wait":
                what, why = (what if what == AWAY else QUEUED), event.reason
            case "admit":
                what, why = BATCH, ITS_TURN
            case "preempt":
                what, why = AWAY, event.reason
            case "pause":
                what, why = ASIDE, event.reason
            case "unpause":
                what, why = QUEUED, BEHIND
            case _:
                what, why = PREFILL, ""
                close(event.end)
                if made and made[-1].what == PREFILL:
                    made[-1].tokens += event.tokens
                what, why = (DECODE, "") if event.sample else (BATCH, ITS_TURN)
    close(end)
    decoding = [segment for segment in made if segment.what == DECODE]
    spent = sum(segment.ms for segment in decoding)
    for segment in decoding:
        segment.tokens = round(tokens * segment.ms / spent)
    return made


async def get_timeline(request: HTTPRequest) -> Response:
    """`GET /v1/requests/{id}/timeline`: of an answer that runs, or ended within the hour. Whoever
    asked for it may see it, and holders of the configuration's own keys any."""
    identifier = request.path_params["id"]
    engine: AsyncEngine = request.app.state.engine
    timelines: Timelines = request.app.state.timelines
    tenant = client_of(request).tenant
    found = []
    # An answer to several prompts has a request for each.
    for number in itertools.count():
        request_id = f"{identifier}-{number}" if number else identifier
        running = engine.delivery.request(request_id) if engine.health() != "loading" else None
        record = timelines.record(request_id) or (Record() if running is not None else None)
        if record is None and number:
            break
        about = running if record is None or record.stats is None else record.stats
        if record is not None and about is not None and tenant in ("", about.tenant):
            stats = record.stats
            choices = engine.delivery.choices(request_id) if stats is None else stats.choices
            found.append(_body(request_id, stats, timelines.told(record, about.arrival, choices)))
    if not found:
        raise HTTPError(
            404, f"nothing is known of an answer {identifier[:100]!r}", param="id", code="not_found"
        )
    return json_response({"id": identifier, "object": "timeline", "requests": found})


def _body(request_id: str, stats: RequestStats | None, told: list[Told]) -> dict[str, object]:
    return {
        "id": request_id,
        "state": "running" if stats is None else "finished",
        "finish_reason": None if stats is None else stats.finish_reason,
        "total_ms": max(choice.total_ms for choice in told),
        "explained": min(choice.explained for choice in told),
        "choices": [choice.summary() for choice in told],
        "segments": [segment for choice in told for segment in choice.segments],
        "prompt_tokens": None if stats is None else stats.prompt_tokens,
        "cached_tokens": None if stats is None else stats.cached_tokens,
        "completion_tokens": None if stats is None else stats.completion_tokens,
    }
