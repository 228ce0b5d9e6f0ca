"""Where a request's time went: every decision of the scheduler about it, with its reason.

The scheduler's decisions and the pieces of prompts that steps computed are kept by request, while
it runs and for an hour; the segments are made from them when somebody asks, and leave no gap.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from engine import AsyncEngine, RequestStats, StepStats
from server.errors import HTTPError, json_response
from server.tenants import client_of

KEEP_SECONDS = 3600.0
KEPT = 10_000
# Of one request: a prompt of many pieces, or one that is preempted again and again, has a bound.
MOST_EVENTS = 2000
QUEUED, BATCH, PREFILL, DECODE, AWAY = "queued", "in the batch", "prefill", "decode", "preempted"
BEHIND = "others are before it"
ITS_TURN = "the step's time goes to others"


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a request, from `at` to `end` (clock seconds)."""

    kind: str
    at: float
    end: float
    reason: str = ""
    tokens: int = 0
    sample: bool = False


class Segment(msgspec.Struct, omit_defaults=True):
    """A part of a request's time, in milliseconds since it arrived."""

    what: str
    from_ms: float
    ms: float
    why: str = ""
    tokens: int = 0


class Record(msgspec.Struct):
    """What is known of one request."""

    events: list[Event] = []
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
            event = Event(decision.kind, decision.at, decision.at, decision.reason)
            self._note(decision.request_id, event)
        begun = stats.at - stats.seconds.get("wait", 0.0)
        for ran in stats.prefills:
            event = Event(PREFILL, begun, stats.at, tokens=ran.count, sample=ran.sample)
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

    def segments(self, record: Record, arrival: float) -> list[Segment]:
        """A request's time from its arrival to its end, or to now, without a gap."""
        stats = record.stats
        end = self._now() if stats is None else stats.finished
        return segments(
            record.events, arrival, end, 0 if stats is None else stats.completion_tokens
        )

    def _note(self, request_id: str, event: Event) -> None:
        if (record := self._ended.get(request_id)) is None:
            record = self._live.setdefault(request_id, Record())
        if len(record.events) < MOST_EVENTS:
            record.events.append(event)


def segments(events: list[Event], arrival: float, end: float, tokens: int) -> list[Segment]:
    """Events as parts of the time between arrival and end; `tokens` were generated."""
    made: list[Segment] = []
    at, what, why = arrival, QUEUED, BEHIND

    def close(until: float) -> None:
        nonlocal at
        until = min(max(until, at), end)
        if until > at:
            made.append(Segment(what, 1e3 * (at - arrival), 1e3 * (until - at), why))
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
            parts = timelines.segments(record, about.arrival)
            found.append(_body(request_id, record, parts))
    if not found:
        raise HTTPError(
            404, f"nothing is known of an answer {identifier[:100]!r}", param="id", code="not_found"
        )
    return json_response({"id": identifier, "object": "timeline", "requests": found})


def _body(request_id: str, record: Record, parts: list[Segment]) -> dict[str, object]:
    stats = record.stats
    total = sum(segment.ms for segment in parts)
    lasted = total if stats is None else 1e3 * (stats.finished - stats.arrival)
    return {
        "id": request_id,
        "state": "running" if stats is None else "finished",
        "finish_reason": None if stats is None else stats.finish_reason,
        "total_ms": round(total, 3),
        "explained": round(total / lasted, 4) if lasted else 1.0,
        "segments": parts,
        "prompt_tokens": None if stats is None else stats.prompt_tokens,
        "cached_tokens": None if stats is None else stats.cached_tokens,
        "completion_tokens": None if stats is None else stats.completion_tokens,
    }
