"""OpenTelemetry traces: one for each request, made when it has ended, and one for some steps.

A request's spans are the segments of its timeline: waiting, each piece of its prompt, decoding as
one, preemptions; their attributes say why. Whether it is traced is decided when it arrives: as its
client's `traceparent` says, else by its trace's id, as OpenTelemetry's ratio sampler does, so that
all who see the trace decide alike. What fails or is slow is sent on top. A step that is slow, and
one in many, is a span with links to the requests that it served. Calls of other servers' tools are
spans of the trace whose answer made them.

An answer's trace goes out as `x-trace-id`, the decision as `x-trace-sampled`; names follow
OpenTelemetry's conventions for generative AI. Spans go to an OTLP collector from a thread; a
collector that does not answer costs a counter.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from prometheus_client.core import Metric

from engine import AsyncEngine, RequestStats, StepStats
from engine.config import TracingSection
from server.bridge.servers import ToolCall
from server.figures import counter, gauge
from server.timeline import Segment, Timelines, Told

TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
NO_PARENT = "0" * 16
# Spans of one choice; a prompt of more pieces has the rest of its time in the last.
MOST_SPANS = 64
MOST_LINKS = 1024
# Spans that may wait for the collector; what comes beyond is dropped.
MOST_WAITING = 2048
NEVER = TraceIdRatioBased(0.0)
EXPORT_SECONDS = 5
OPERATIONS = {"chatcmpl": "chat", "resp": "chat", "msg": "chat", "cmpl": "text_completion"}


def sampler_of(settings: TracingSection) -> TraceIdRatioBased:
    """Chooses by traces' ids; nothing where nothing is sent."""
    return TraceIdRatioBased(settings.sample_ratio) if settings.endpoint else NEVER


def trace_of(headers: Mapping[str, str], sampler: TraceIdRatioBased = NEVER) -> str:
    """The trace that a request belongs to and whether it is sampled, as `traceparent` writes it:
    the client's with the client's choice, or a new one that has no parent."""
    found = TRACEPARENT.fullmatch(headers.get("traceparent", "").strip().lower())
    if found is not None and found[1].strip("0") and found[2].strip("0"):
        return found[0]
    trace = secrets.token_hex(16)
    sampled = sampler.should_sample(None, int(trace, 16), "").decision is Decision.RECORD_AND_SAMPLE
    return f"00-{trace}-{NO_PARENT}-{sampled:02x}"


def is_sampled(trace: str) -> bool:
    """Whether a trace was chosen when its request arrived; an empty one was not."""
    return int(trace[-2:] or "0", 16) & TraceFlags.SAMPLED != 0


class Ids(RandomIdGenerator):
    """Ids that are known before their span is made, of one span at a time."""

    def __init__(self) -> None:
        self.trace_id: int | None = None
        self.span_id: int | None = None

    def generate_trace_id(self) -> int:
        known, self.trace_id = self.trace_id, None
        return super().generate_trace_id() if known is None else known

    def generate_span_id(self) -> int:
        known, self.span_id = self.span_id, None
        return super().generate_span_id() if known is None else known


class Counted(SpanExporter):
    """Counts what reaches the collector and what does not: spans, and whole exports."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.sent = self.lost = 0
        self.exports: Counter[tuple[str]] = Counter({("ok",): 0, ("failed",): 0})

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Pass spans on."""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is SpanExportResult.SUCCESS:
                self.sent += len(spans)
                self.exports["ok",] += 1
            else:
                self.lost += len(spans)
                self.exports["failed",] += 1
        return result

    def shutdown(self) -> None:
        """Pass it on."""
        self._exporter.shutdown()


class Waiting(BatchSpanProcessor):
    """Spans on their way to the exporter: so many, and no more."""

    def __init__(self, exporter: Counted) -> None:
        super().__init__(exporter, max_queue_size=MOST_WAITING)
        self._counted = exporter
        self._taken = 0
        self.dropped = 0

    @property
    def count(self) -> int:
        """Spans that are neither sent nor lost yet."""
        return self._taken - self._counted.sent - self._counted.lost

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span, unless too many wait."""
        if self.count >= MOST_WAITING:
            self.dropped += 1
            return
        self._taken += 1
        super().on_end(span)


class Tracing:
    """A listener of one engine, behind its timelines."""

    def __init__(self, engine: AsyncEngine, timelines: Timelines, settings: TracingSection) -> None:
        self._engine = engine
        self._timelines = timelines
        self._settings = settings
        self._ended: list[RequestStats] = []
        # What steps have as links to requests, whose spans are made later.
        self._linked: dict[str, Link] = {}
        self._ids = Ids()
        self.made: Counter[tuple[str]] = Counter(
            {("sampled",): 0, ("slow",): 0, ("failed",): 0, ("step",): 0}
        )
        """Traces by why they were made."""
        self.exporter = Counted(
            OTLPSpanExporter(endpoint=settings.endpoint, timeout=EXPORT_SECONDS)
        )
        self.waiting = Waiting(self.exporter)
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what is made has been chosen
            resource=Resource.create({"service.name": settings.service}),
            id_generator=self._ids,
            span_limits=SpanLimits(max_links=MOST_LINKS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self.waiting)
        self._tracer = self._provider.get_tracer("ryzanstein")
        # The timelines' clock is monotonic; spans have dates.
        self._epoch = time.time() - time.monotonic()

    def on_step(self, stats: StepStats) -> None:
        """The last step of those that have ended is known now, too."""
        every = self._settings.step_every
        slow = stats.seconds.get("wait", 0.0) >= self._settings.slow_step_seconds
        if slow or (every and stats.step % every == every - 1):
            self._emit_step(stats, slow)
        if self._ended:
            self.flush()

    def on_request(self, stats: RequestStats) -> None:
        """Its spans are made behind the step that ended it."""
        self._ended.append(stats)

    def on_tool_call(self, call: ToolCall) -> None:
        """A call between two turns of an answer; told if its trace is sampled, or if it failed."""
        if not call.trace or not (call.failed or is_sampled(call.trace)):
            return
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": call.tool,
            "gen_ai.tool.type": "extension",
            "ryzanstein.mcp_server": call.server,
        }
        span = self._tracer.start_span(
            f"execute_tool {call.tool}",
            self._below(call.trace),
            SpanKind.CLIENT,
            attributes=attributes,
            start_time=self._date(call.begun),
        )
        if call.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._date(call.ended))

    def flush(self) -> None:
        """Make the spans of those that have ended and are to be traced."""
        ended, self._ended = self._ended, []
        for stats in ended:
            link = self._linked.pop(stats.id, None)
            span_id = None if link is None else link.context.span_id
            why, record = self._why(stats), self._timelines.record(stats.id)
            if why and record is not None:
                self.made[why,] += 1
                told = self._timelines.told(record, stats.arrival, stats.choices)
                self._emit(stats, told, span_id)

    def collect(self) -> Iterator[Metric]:
        """How much was made and what became of it, as metrics."""
        yield counter("ryzanstein_traces", "Traces made, by why", self.made, ["why"])
        outcomes = {
            ("sent",): self.exporter.sent,
            ("lost",): self.exporter.lost,
            ("dropped",): self.waiting.dropped,
        }
        text = "Spans: sent, lost with an export, or dropped since too many waited"
        yield counter("ryzanstein_spans", text, outcomes, ["outcome"])
        text = "Exports to the collector, of many spans each"
        yield counter("ryzanstein_span_exports", text, self.exporter.exports, ["outcome"])
        text = "Spans that wait for the collector"
        yield gauge("ryzanstein_spans_waiting", text, self.waiting.count)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self.flush()
        self._provider.force_flush(1000 * EXPORT_SECONDS)
        self._provider.shutdown()

    def _why(self, stats: RequestStats) -> str:
        """Why a request is traced; empty if it is not."""
        if stats.finish_reason == "error":
            return "failed"
        if stats.finished - stats.arrival >= self._settings.slow_seconds:
            return "slow"
        return "sampled" if is_sampled(stats.trace) else ""

    def _emit_step(self, stats: StepStats, slow: bool) -> None:
        """A step's span, in a trace of its own."""
        # A step that was under way may still serve what has ended and been told.
        ended = {request.id for request in self._ended}
        served = [s for s in stats.served if s.finish_reason is None or s.request.id in ended]
        links = []
        for request in {row.request.id: row.request for row in served}.values():
            if request.trace:
                if request.id not in self._linked:
                    self._linked[request.id] = self._link(request.trace)
                links.append(self._linked[request.id])
        attributes: dict[str, str | int | float] = {
            "ryzanstein.why": "slow" if slow else "one in many",
            "ryzanstein.step": stats.step,
            "ryzanstein.decode_rows": stats.decode_rows,
            "ryzanstein.prefill_tokens": stats.prefill_tokens,
            "ryzanstein.waiting": stats.waiting,
            "ryzanstein.predicted_seconds": stats.predicted,
        }
        for part, seconds in stats.seconds.items():
            attributes[f"ryzanstein.seconds.{part}"] = seconds
        begun = self._date(stats.at - stats.seconds.get("wait", 0.0))
        span = self._tracer.start_span(
            "step", Context(), attributes=attributes, links=links, start_time=begun
        )
        span.end(self._date(stats.at))
        self.made["step",] += 1

    def _link(self, trace: str) -> Link:
        """To the span that a request will have."""
        flags = TraceFlags(TraceFlags.SAMPLED if is_sampled(trace) else 0)
        trace_id, span_id = int(trace.split("-")[1], 16), self._ids.generate_span_id()
        return Link(SpanContext(trace_id, span_id, is_remote=False, trace_flags=flags))

    def _emit(self, stats: RequestStats, told: Sequence[Told], span_id: int | None) -> None:
        root = self._begin(stats, span_id)
        inner = set_span_in_context(root)
        for choice in told:
            for segment in _bounded(choice.segments):
                self._emit_segment(segment, stats.arrival, inner, several=len(told) > 1)
        root.end(self._date(stats.finished))

    def _emit_segment(
        self, segment: Segment, arrival: float, inner: Context, *, several: bool
    ) -> None:
        begun = arrival + segment.from_ms / 1e3
        attributes: dict[str, str | int] = {}
        if several:
            attributes["ryzanstein.choice"] = segment.index
        if segment.why:
            attributes["ryzanstein.why"] = segment.why
        if segment.tokens:
            attributes["ryzanstein.tokens"] = segment.tokens
        span = self._tracer.start_span(
            segment.what, inner, attributes=attributes, start_time=self._date(begun)
        )
        span.end(self._date(begun + segment.ms / 1e3))

    def _begin(self, stats: RequestStats, span_id: int | None) -> Span:
        """The request's own span, below its client's if there is one; steps may know its id."""
        context = self._below(stats.trace or trace_of({}))
        self._ids.span_id = span_id
        model = self._engine.parts.model_name
        operation = OPERATIONS.get(stats.id.partition("-")[0].partition("_")[0], "text_completion")
        attributes: dict[str, str | int | float | list[str]] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "ryzanstein",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": stats.id,
            "gen_ai.response.finish_reasons": [stats.finish_reason],
            "gen_ai.usage.input_tokens": stats.prompt_tokens,
            "gen_ai.usage.output_tokens": stats.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
            "ryzanstein.tenant": stats.tenant,
            "ryzanstein.preemptions": stats.preemptions,
        }
        if stats.first_token is not None:
            first = stats.first_token - stats.arrival
            attributes["gen_ai.server.time_to_first_token"] = first
        span = self._tracer.start_span(
            f"{operation} {model}",
            context,
            SpanKind.SERVER,
            attributes=attributes,
            start_time=self._date(stats.arrival),
        )
        if stats.finish_reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        return span

    def _below(self, trace: str) -> Context:
        """Where the next span belongs: below a client's, or else in its trace, alone."""
        trace_id, parent, flags = trace.split("-")[1:]
        if parent == NO_PARENT:
            self._ids.trace_id = int(trace_id, 16)
            return Context()
        remote = SpanContext(
            int(trace_id, 16),
            int(parent, 16),
            is_remote=True,
            trace_flags=TraceFlags(int(flags, 16)),
        )
        return set_span_in_context(NonRecordingSpan(remote), Context())

    def _date(self, at: float) -> int:
        """Nanoseconds since 1970."""
        return round(1e9 * (at + self._epoch))


def _bounded(segments: list[Segment]) -> list[Segment]:
    """The first of them, and what is left in one."""
    if len(segments) <= MOST_SPANS:
        return segments
    rest = segments[MOST_SPANS - 1 :]
    whole = Segment(rest[0].index, "and so on", rest[0].from_ms, sum(s.ms for s in rest))
    return [*segments[: MOST_SPANS - 1], whole]
