"""Prometheus metrics from the engine's step and request statistics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from engine import AsyncEngine, RequestStats, StepStats
from engine.scheduling.scheduler import Scheduler

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A listener of one engine. Every metric's name starts with `ryzanstein_`.

    Gauges read the scheduler when they are scraped, so that an idle engine shows its true state.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._engine = engine
        self._gauge("requests_running", "Sequences in the batch", lambda s: len(s.running))
        self._gauge("requests_waiting", "Sequences in the queue", lambda s: len(s.queue))
        self._gauge("kv_pages_used", "KV pages that sequences hold", lambda s: s.pool.used)
        self._gauge("kv_pages_cached", "Free pages with content", lambda s: s.pool.cached)
        self._gauge("kv_pages_total", "KV pages of the pool", lambda s: s.pool.total)
        self._gauge(
            "kv_pages_parked", "Pages given back", lambda s: s.pool.total - s.pool.available
        )
        self._gauge("kv_pages_cold", "Pages in the cold tier", lambda s: len(s.cold))
        self._gauge("kv_evictions", "Cached pages forgotten so far", lambda s: s.pool.evictions)
        self._gauge("kv_cold_hits", "Pages read back from the cold tier", lambda s: s.cold.hits)
        self._gauge(
            "step_prediction_error", "Median error of recent steps", lambda s: s.cost.median_error
        )
        self._predicted = self._counter("step_predicted_seconds", "Time that steps were to take")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the cache")
        self._output_tokens = self._counter("output_tokens", "Tokens generated")
        self._preemptions = self._counter("preemptions", "Sequences sent back to the queue")
        self._steps = self._counter("steps", "Steps run")
        self._seconds = Counter(
            "ryzanstein_step_seconds", "Time in steps by part", ["part"], registry=self.registry
        )
        self._finished = Counter(
            "ryzanstein_requests_finished",
            "Finished requests by reason",
            ["reason"],
            registry=self.registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token")
        self._queue = self._histogram("queue_seconds", "Arrival to first step")
        self._total = self._histogram("request_seconds", "Arrival to last token")
        self._per_token = self._histogram("time_per_output_token_seconds", "After the first token")
        self._seen_preemptions = 0

    def on_step(self, stats: StepStats) -> None:
        """Take one step's statistics."""
        self._steps.inc()
        self._predicted.inc(stats.predicted)
        self._preemptions.inc(stats.preemptions - self._seen_preemptions)
        self._seen_preemptions = stats.preemptions
        for part, seconds in stats.seconds.items():
            self._seconds.labels(part).inc(seconds)

    def on_request(self, stats: RequestStats) -> None:
        """Take one finished request's statistics."""
        self._finished.labels(stats.finish_reason).inc()
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._cached_tokens.inc(stats.cached_tokens)
        self._output_tokens.inc(stats.completion_tokens)
        self._total.observe(stats.finished - stats.arrival)
        if stats.first_scheduled is not None:
            self._queue.observe(stats.first_scheduled - stats.arrival)
        if stats.first_token is not None:
            self._ttft.observe(stats.first_token - stats.arrival)
            if stats.completion_tokens > 1:
                rest = stats.finished - stats.first_token
                self._per_token.observe(rest / (stats.completion_tokens - 1))

    def _gauge(self, name: str, text: str, read: Callable[[Scheduler], float]) -> None:
        def value() -> float:
            loading = self._engine.health() == "loading"
            return 0 if loading else read(self._engine.parts.scheduler)

        Gauge(f"ryzanstein_{name}", text, registry=self.registry).set_function(value)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"ryzanstein_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"ryzanstein_{name}", text, buckets=LATENCY, registry=self.registry)


async def metrics(request: Request) -> ASGIApp:
    """`GET /metrics`."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
