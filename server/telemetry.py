"""Prometheus metrics of the engine: what it does, how long that takes, what it holds.

Names begin with `ryzanstein_`; those that vLLM's dashboards ask for are there under its names, too.
A step appends its statistics to a list and nothing else; they are added up once a second, or when
somebody scrapes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from engine import AsyncEngine, RequestStats, StepStats
from engine.execution.memory import device_memory
from engine.version import VERSION
from server.figures import COUNTS, SECONDS, Histogram, Limited, counter, gauge, relabelled
from server.journal import Journal
from server.tracing import Tracing
from server.traffic import Traffic

STATES = ("ok", "loading", "draining", "stalled", "restarting", "failed")
# Tenants are configured, not sent, but a file can name many.
MOST_TENANTS = 200
DRAIN_SECONDS = 1.0
MOST_PENDING = 2048
# How often the event loop's lag is measured.
LAG_SECONDS = 0.1
# Ours -> vLLM's.
VLLM_NAMES = {
    "ryzanstein_requests_running": "vllm:num_requests_running",
    "ryzanstein_requests_waiting": "vllm:num_requests_waiting",
    "ryzanstein_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "ryzanstein_preemptions": "vllm:num_preemptions",
    "ryzanstein_prompt_tokens": "vllm:prompt_tokens",
    "ryzanstein_cached_tokens": "vllm:prefix_cache_hits",
    "ryzanstein_output_tokens": "vllm:generation_tokens",
    "ryzanstein_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "ryzanstein_inter_token_seconds": "vllm:inter_token_latency_seconds",
    "ryzanstein_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "ryzanstein_request_seconds": "vllm:e2e_request_latency_seconds",
    "ryzanstein_queue_seconds": "vllm:request_queue_time_seconds",
    "ryzanstein_prefill_seconds": "vllm:request_prefill_time_seconds",
    "ryzanstein_decode_seconds": "vllm:request_decode_time_seconds",
    "ryzanstein_request_prompt_tokens": "vllm:request_prompt_tokens",
    "ryzanstein_request_output_tokens": "vllm:request_generation_tokens",
    "ryzanstein_step_tokens": "vllm:iteration_tokens_total",
    "ryzanstein_drafts": "vllm:spec_decode_num_drafts",
    "ryzanstein_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "ryzanstein_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens",
}


class Steps:
    """Sums over steps."""

    def __init__(self) -> None:
        self.count = self.busy = 0
        self.predicted = 0.0
        self.parts: defaultdict[tuple[str], float] = defaultdict(float)
        self.seconds = Histogram(SECONDS)
        self.rows = Histogram(COUNTS)
        self.tokens = Histogram(COUNTS)
        self.between = Histogram(SECONDS)
        self.preemptions: Counter[tuple[str]] = Counter()

    def add(self, stats: StepStats) -> None:
        """One step."""
        self.count += 1
        self.busy += stats.busy
        self.predicted += stats.predicted
        for part, seconds in stats.seconds.items():
            self.parts[part,] += seconds
        whole = stats.seconds.get("wait", 0.0)
        self.seconds.observe(whole)
        self.rows.observe(stats.decode_rows)
        self.tokens.observe(stats.decode_rows + stats.drafted + stats.prefill_tokens)
        for seconds, times in stats.gaps.items():
            self.between.observe(seconds, times)
        for decision in stats.decisions:
            if decision.kind == "preempt":
                self.preemptions[decision.reason,] += 1

    def collect(self) -> Iterator[Metric]:
        """As metrics."""
        yield counter("ryzanstein_steps", "Steps run", self.count)
        text = "Steps computed with the weights for busy times"
        yield counter("ryzanstein_busy_steps", text, self.busy)
        text = "Time that steps were predicted to take"
        yield counter("ryzanstein_step_predicted_seconds", text, self.predicted)
        yield counter("ryzanstein_step_seconds", "Time in steps by part", self.parts, ["part"])
        yield self.seconds.family(
            "ryzanstein_step_duration_seconds", "From a step's start to its end"
        )
        yield self.rows.family("ryzanstein_step_sequences", "Sequences that decode in a step")
        yield self.tokens.family("ryzanstein_step_tokens", "Tokens computed in a step")
        text = "Time between two tokens of an answer whose reader keeps up"
        yield self.between.family("ryzanstein_inter_token_seconds", text)
        text = "Sequences sent back to the queue, by reason"
        yield counter("ryzanstein_preemptions_by_reason", text, self.preemptions, ["reason"])


class Requests:
    """Sums over requests that have ended."""

    def __init__(self) -> None:
        self.finished: Counter[tuple[str]] = Counter({("stop",): 0, ("error",): 0, ("abort",): 0})
        self.prompt = self.cached = self.output = 0
        self.of_tenants = Limited(2 * MOST_TENANTS)
        self.ttft, self.queue, self.total = (Histogram(SECONDS) for _ in range(3))
        self.per_token, self.prefill, self.decode = (Histogram(SECONDS) for _ in range(3))
        self.prompts, self.outputs = Histogram(COUNTS), Histogram(COUNTS)

    def add(self, stats: RequestStats) -> None:
        """One request."""
        self.finished[stats.finish_reason,] += 1
        self.prompt += stats.prompt_tokens
        self.cached += stats.cached_tokens
        self.output += stats.completion_tokens
        self.of_tenants.add((stats.tenant, "prompt"), stats.prompt_tokens)
        self.of_tenants.add((stats.tenant, "output"), stats.completion_tokens)
        self.prompts.observe(stats.prompt_tokens)
        self.outputs.observe(stats.completion_tokens)
        self.total.observe(stats.finished - stats.arrival)
        if stats.first_scheduled is None:
            return
        self.queue.observe(stats.first_scheduled - stats.arrival)
        if stats.first_token is None:
            return
        self.ttft.observe(stats.first_token - stats.arrival)
        self.prefill.observe(stats.first_token - stats.first_scheduled)
        rest = stats.finished - stats.first_token
        self.decode.observe(rest)
        if stats.completion_tokens > 1:
            self.per_token.observe(rest / (stats.completion_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """As metrics."""
        yield counter(
            "ryzanstein_requests_finished", "Finished requests by reason", self.finished, ["reason"]
        )
        yield counter("ryzanstein_prompt_tokens", "Prompt tokens of finished requests", self.prompt)
        yield counter("ryzanstein_cached_tokens", "Prompt tokens found in the cache", self.cached)
        yield counter("ryzanstein_output_tokens", "Tokens generated", self.output)
        text = "Tokens of finished requests, by tenant"
        yield counter("ryzanstein_tenant_tokens", text, self.of_tenants, ["tenant", "kind"])
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", self.ttft),
            ("queue_seconds", "Arrival to first step", self.queue),
            ("prefill_seconds", "First step to first token", self.prefill),
            ("decode_seconds", "First token to last", self.decode),
            ("request_seconds", "Arrival to last token", self.total),
            (
                "time_per_output_token_seconds",
                "Mean, after the first",
                self.per_token,
            ),
            ("request_prompt_tokens", "Tokens of a prompt", self.prompts),
            ("request_output_tokens", "Tokens of an answer", self.outputs),
        ):
            yield histogram.family(f"ryzanstein_{name}", text)


class Metrics(Collector):
    """A listener of one engine, and a collector. What the scheduler holds is read when somebody
    scrapes, so that an idle engine shows its true state."""

    def __init__(self, engine: AsyncEngine, traffic: Traffic) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._engine = engine
        self._traffic = traffic
        self._steps = Steps()
        self._requests = Requests()
        self._lag = Histogram(SECONDS)
        self._pending: list[StepStats] = []
        self.tracing: Tracing | None = None
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def on_step(self, stats: StepStats) -> None:
        """Keep one step's statistics for later."""
        self._pending.append(stats)
        if len(self._pending) >= MOST_PENDING:
            self._drain()

    def on_request(self, stats: RequestStats) -> None:
        """Take one finished request's statistics."""
        self._requests.add(stats)

    async def watch(self) -> None:
        """Add up what steps have left, and measure how late the event loop is."""
        rounds, loop = round(DRAIN_SECONDS / LAG_SECONDS), asyncio.get_running_loop()
        while True:
            for _ in range(rounds):
                due = loop.time() + LAG_SECONDS
                await asyncio.sleep(LAG_SECONDS)
                self._lag.observe(max(0.0, loop.time() - due))
            self._drain()

    def collect(self) -> Iterator[Metric]:
        """Everything, as it stands."""
        self._drain()
        model = ""
        ours = [*self._state(), *self._steps.collect(), *self._requests.collect()]
        if self._engine.health() != "loading":
            model = self._engine.parts.model_name
            ours += self._held()
        yield from ours
        yield from self._traffic.collect()
        labels = {"model_name": model, "engine": "0"}
        for metric in ours:
            if metric.name in VLLM_NAMES:
                yield relabelled(metric, VLLM_NAMES[metric.name], labels)
        looked_up = counter("queries", "Prompt tokens looked up", self._requests.prompt)
        yield relabelled(looked_up, "vllm:prefix_cache_queries", labels)
        text = "Finished requests"
        finished = counter("success", text, self._requests.finished, ["finished_reason"])
        yield relabelled(finished, "vllm:request_success", labels)

    def _drain(self) -> None:
        pending, self._pending = self._pending, []
        for stats in pending:
            self._steps.add(stats)

    def _state(self) -> Iterator[Metric]:
        state = self._engine.health()
        loaded = state != "loading"
        labels = {
            "version": VERSION,
            "model": self._engine.parts.model_name if loaded else "",
            "device": self._engine.parts.device if loaded else "",
        }
        values = {tuple(labels.values()): 1.0}
        yield gauge("ryzanstein_build_info", "What serves", values, list(labels))
        states = {(name,): float(name == state) for name in STATES}
        yield gauge("ryzanstein_engine_state", "1 for the state that it is in", states, ["state"])
        text = "How late the event loop comes to what is due"
        yield self._lag.family("ryzanstein_loop_lag_seconds", text)
        # Whoever collects does so on the loop.
        text = "Processor time of the event loop's thread"
        yield counter("ryzanstein_loop_cpu_seconds", text, time.thread_time())
        handlers = logging.getLogger().handlers
        dropped = sum(h.dropped for h in handlers if isinstance(h, Journal))
        text = "Lines that could not be logged in time, or at all"
        yield counter("ryzanstein_log_lines_dropped", text, dropped)
        if self.tracing is not None:
            yield from self.tracing.collect()
        # While a model is loaded, torch may be half imported.
        if loaded and (memory := device_memory()) is not None:
            used, total = memory
            text = "Bytes of the GPU's memory"
            bytes_ = {("used",): used, ("total",): total}
            yield gauge("ryzanstein_gpu_memory_bytes", text, bytes_, ["kind"])

    def _held(self) -> Iterator[Metric]:
        """What the scheduler and its pool hold, and have counted."""
        scheduler = self._engine.parts.scheduler
        pool, cold = scheduler.pool, scheduler.cold
        windows = pool.windows
        beside = (windows.used, windows.total, windows.evictions) if windows else (0, 0, 0)
        kept, places = scheduler.prefixes.states
        for name, text, value in (
            ("requests_running", "Sequences in the batch", len(scheduler.running)),
            ("requests_waiting", "Sequences in the queue", len(scheduler.queue)),
            ("waiting_tokens", "Tokens of the prompts in the queue", scheduler.queue.tokens),
            ("kv_pages_used", "KV pages that sequences hold", pool.used),
            ("kv_pages_cached", "Free pages with content", pool.cached),
            ("kv_pages_kept", "Those of them that are kept for who is to go on", pool.kept),
            ("kv_pages", "KV pages of the pool", pool.total),
            ("kv_pages_parked", "Pages given back to the system", pool.total - pool.available),
            ("states_kept", "States of recurrent layers that can be gone on from", kept),
            ("states_places", "Places for them", places),
            ("kv_window_pages_used", "Window pages that sequences hold", beside[0]),
            ("kv_window_pages", "Pages of layers that see a window only, if apart", beside[1]),
            ("kv_pages_cold", "Pages in the cold tier", len(cold)),
            ("kv_usage_ratio", "Share of the pages that sequences hold", pool.usage),
            ("step_prediction_error", "Median error of recent steps", scheduler.cost.median_error),
        ):
            yield gauge(f"ryzanstein_{name}", text, value)
        moves = {("stored",): cold.stored, ("restored",): cold.hits}
        evicted = {
            ("room",): pool.evictions,
            ("memory",): pool.surrendered,
            ("window",): beside[2],
        }
        guesses = scheduler.speculator
        yield counter("ryzanstein_drafts", "Guesses of what follows", guesses.steps)
        yield counter("ryzanstein_draft_tokens", "Tokens that were guessed", guesses.drafted)
        text = "Guessed tokens that were right"
        yield counter("ryzanstein_accepted_draft_tokens", text, guesses.accepted)
        losses = self._engine.parts.stepper.losses
        text = "Cached pages forgotten, for room or because memory was short, or window pages"
        yield counter("ryzanstein_kv_evictions", text, evicted, ["reason"])
        yield counter(
            "ryzanstein_kv_cold_pages", "Pages moved to and from the cold tier", moves, ["way"]
        )
        yield counter(
            "ryzanstein_preemptions", "Sequences sent back to the queue", scheduler.preemptions
        )
        yield counter("ryzanstein_rank_losses", "How often the model's ranks were lost", losses)
        refusals = Limited(8 * MOST_TENANTS)
        for (tenant, reason), count in self._engine.admission.refusals.items():
            refusals.add((tenant, reason), count)
        text = "Requests refused at the door, by tenant and reason"
        yield counter("ryzanstein_requests_refused", text, refusals, ["tenant", "reason"])
        waiting = Limited(MOST_TENANTS)
        for tenant, account in scheduler.queue.accounts.items():
            waiting.add((tenant,), len(account.waiting))
        text = "Sequences in the queue, by tenant"
        yield gauge("ryzanstein_tenant_waiting", text, waiting, ["tenant"])


async def metrics(request: Request) -> ASGIApp:
    """`GET /metrics`."""
    text = generate_latest(request.app.state.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
