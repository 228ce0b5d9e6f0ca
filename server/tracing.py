"""OpenTelemetry traces: one for each request, made when it has ended.

A request's spans are the segments of its timeline: waiting, each piece of its prompt, decoding as
one, preemptions; their attributes say why. Since all is known by then, those that failed or were
slow are always sent, of the others a share. Context comes in by W3C's `traceparent`, an answer's
trace goes out as `x-trace-id`, names follow OpenTelemetry's conventions for generative AI. Spans go
to an OTLP collector from a thread; a collector that does not answer costs a counter.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from engine import AsyncEngine, RequestStats, StepStats
from engine.config import TracingSection
from server.timeline import Segment, Timelines

TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
NO_PARENT = "0" * 16
# Spans of one request; a prompt of more pieces has the rest of its time in the last.
MOST_SPANS = 64
EXPORT_SECONDS = 5
OPERATIONS = {"chatcmpl": "chat", "resp": "chat", "msg": "chat", "cmpl": "text_completion"}


def trace_of(headers: Mapping[str, str]) -> str:
    """The trace that a request belongs to, as `traceparent` writes it: the client's, or a new one
    that has no parent."""
    found = TRACEPARENT.fullmatch(headers.get("traceparent", "").strip().lower())
    if found is not None and found[1].strip("0") and found[2].strip("0"):
        return found[0]
    return f"00-{secrets.token_hex(16)}-{NO_PARENT}-00"


class Ids(RandomIdGenerator):
    """Trace ids are known before their first span is made."""

    def __init__(self) -> None:
        self.trace_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id


class Counted(SpanExporter):
    """Counts what reaches the collector and what does not."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.sent = self.lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Pass spans on."""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self.sent += len(spans)
        else:
            self.lost += len(spans)
        return result

    def shutdown(self) -> None:
        """Pass it on."""
        self._exporter.shutdown()


class Tracing:
    """A listener of one engine, behind its timelines."""

    def __init__(self, engine: AsyncEngine, timelines: Timelines, settings: TracingSection) -> None:
        self._engine = engine
        self._timelines = timelines
        self._settings = settings
        self._ended: list[RequestStats] = []
        self._ids = Ids()
        self.exporter = Counted(
            OTLPSpanExporter(endpoint=settings.endpoint, timeout=EXPORT_SECONDS)
        )
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": settings.service}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(self.exporter))
        self._tracer = self._provider.get_tracer("ryzanstein")
        # The timelines' clock is monotonic; spans have dates.
        self._epoch = time.time() - time.monotonic()

    def on_step(self, stats: StepStats) -> None:
        """The last step of those that have ended is known now, too."""
        self.flush()

    def on_request(self, stats: RequestStats) -> None:
        """Choose what is traced."""
        failed = stats.finish_reason == "error"
        slow = stats.finished - stats.arrival >= self._settings.slow_seconds
        asked = bool(int(stats.trace[-2:] or "0", 16) & 1) if stats.trace else False
        if failed or slow or asked or random.random() < self._settings.sample_ratio:
            self._ended.append(stats)

    def flush(self) -> None:
        """Make the spans of those that have ended."""
        ended, self._ended = self._ended, []
        for stats in ended:
            record = self._timelines.record(stats.id)
            if record is not None:
                self._emit(stats, self._timelines.segments(record, stats.arrival))

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self.flush()
        self._provider.force_flush(1000 * EXPORT_SECONDS)
        self._provider.shutdown()

    def _emit(self, stats: RequestStats, segments: list[Segment]) -> None:
        root = self._begin(stats)
        inner = set_span_in_context(root)
        if len(segments) > MOST_SPANS:
            rest = segments[MOST_SPANS - 1 :]
            whole = Segment("and so on", rest[0].from_ms, sum(s.ms for s in rest))
            segments = [*segments[: MOST_SPANS - 1], whole]
        for segment in segments:
            begun = stats.arrival + segment.from_ms / 1e3
            attributes: dict[str, str | int] = {}
            if segment.why:
                attributes["ryzanstein.why"] = segment.why
            if segment.tokens:
                attributes["ryzanstein.tokens"] = segment.tokens
            span = self._tracer.start_span(
                segment.what, inner, attributes=attributes, start_time=self._date(begun)
            )
            span.end(self._date(begun + segment.ms / 1e3))
        root.end(self._date(stats.finished))

    def _begin(self, stats: RequestStats) -> Span:
        """The request's own span, below its client's if there is one."""
        trace, parent = (stats.trace or trace_of({})).split("-")[1:3]
        self._ids.trace_id = int(trace, 16)
        context = None
        if parent != NO_PARENT:
            remote = SpanContext(
                int(trace, 16), int(parent, 16), is_remote=True, trace_flags=TraceFlags(1)
            )
            context = set_span_in_context(NonRecordingSpan(remote))
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

    def _date(self, at: float) -> int:
        """Nanoseconds since 1970."""
        return round(1e9 * (at + self._epoch))
