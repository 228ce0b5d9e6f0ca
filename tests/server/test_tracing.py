"""Traces, received over OTLP by a collector of the test's own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from engine import SamplingParams
from engine.config import TracingSection
from engine.scheduling.sequence import Sequence
from engine.types import Request
from server.timeline import Timelines
from server.tracing import MOST_WAITING, NO_PARENT, Counted, Tracing, Waiting, trace_of
from tests.mock import mock_engine
from tests.server.collector import Collector
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess
from tests.server.stats import ended, step
from tests.untraced import untraced

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def server(endpoint: str, *, delay: float = 0.002, **tracing: object) -> ServerProcess:
    env = {
        "MOCK_TRACING": json.dumps({"endpoint": endpoint, **tracing}),
        "MOCK_ENGINE": json.dumps({"delay": delay}),
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    return ServerProcess(module="tests.server.mock_server", env=env)


def complete(made: ServerProcess, tokens: int = 6, trace: str = "") -> httpx.Response:
    body = {"model": "mock", "prompt": "what it is about", "max_tokens": tokens}
    headers = {"traceparent": trace} if trace else {}
    return httpx.post(f"{made.url}/v1/completions", json=body, headers=headers, timeout=30)


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_a_request_is_one_trace_below_its_clients_span(collector: Collector) -> None:
    with server(collector.endpoint, sample_ratio=0.0) as made:
        answer = complete(made, trace=f"00-{TRACE}-{PARENT}-01")
        assert answer.headers["x-trace-id"] == TRACE
        complete(made)  # nobody asked for this one, and it is quick
    spans = {span.name: span for span in collector.of(TRACE)}
    assert len(collector.spans) == len(spans), "a trace that nobody asked for"
    root = spans["text_completion mock"]
    assert root.parent_span_id.hex() == PARENT
    assert root.kind == 2  # server
    said = attributes(root)
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.request.model"] == "mock"
    assert said["gen_ai.response.id"] == answer.json()["id"]
    assert said["gen_ai.response.finish_reasons"] == ["length"]
    assert said["gen_ai.usage.input_tokens"] == len("what it is about")
    assert said["gen_ai.usage.output_tokens"] == 6
    assert 0 < said["gen_ai.server.time_to_first_token"] < 5
    assert {"prefill", "decode"} <= set(spans)
    inner = [span for span in spans.values() if span is not root]
    assert all(span.parent_span_id == root.span_id for span in inner)
    assert attributes(spans["decode"])["ryzanstein.tokens"] == 6
    # Without a gap, and of this very moment.
    assert min(s.start_time_unix_nano for s in inner) == root.start_time_unix_nano
    assert abs(max(s.end_time_unix_nano for s in inner) - root.end_time_unix_nano) < 1_000_000
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 60
    assert "what it is about" not in str(collector.spans)


def test_a_share_is_traced_and_all_that_are_slow_or_fail(collector: Collector) -> None:
    with server(collector.endpoint, sample_ratio=0.0, slow_seconds=0.1, delay=0.02) as made:
        quick = complete(made, 1).headers["x-trace-id"]
        slow = complete(made, 12).headers["x-trace-id"]
        httpx.post(f"{made.url}/test/fail")
        failed = complete(made, 1).headers["x-trace-id"]
    assert not collector.of(quick)
    assert collector.of(slow)
    (root,) = (span for span in collector.of(failed) if not span.parent_span_id)
    assert root.status.code == 2
    with server(collector.endpoint, sample_ratio=1.0) as made:
        every = complete(made, 1).headers["x-trace-id"]
    assert collector.of(every)


def test_the_choice_is_made_at_the_start_from_the_traces_id(collector: Collector) -> None:
    """By the ratio of the id's lower half; what is told is what is done."""
    answers = {}
    with server(collector.endpoint, sample_ratio=0.5, step_every=0) as made:
        for _ in range(30):
            headers = complete(made, 1).headers
            answers[headers["x-trace-id"]] = headers["x-trace-sampled"]
    for trace, sampled in answers.items():
        below = int(trace[16:], 16) < 2**63
        assert sampled == str(int(below))
        assert bool(collector.of(trace)) == below
    assert set(answers.values()) == {"0", "1"}


@pytest.mark.parametrize("sampled", [False, True])
def test_a_client_that_has_chosen_is_followed(collector: Collector, *, sampled: bool) -> None:
    """Whatever the ratio says; what it left out is sent all the same if it fails."""
    ratio = float(not sampled)
    trace = f"00-{TRACE}-{PARENT}-0{sampled:d}"
    with server(collector.endpoint, sample_ratio=ratio, step_every=0) as made:
        answer = complete(made, 1, trace)
        assert answer.headers["x-trace-sampled"] == str(int(sampled))
        while made.metric("ryzanstein_spans_waiting"):
            time.sleep(0.02)
        assert bool(collector.of(TRACE)) == sampled
        httpx.post(f"{made.url}/test/fail")
        complete(made, 1, trace)
    failed = [span for span in collector.of(TRACE) if span.status.code == 2]
    assert len(failed) == 1
    assert failed[0].parent_span_id.hex() == PARENT


def test_where_nothing_is_sent_nothing_is_chosen(mock_server: MockFactory) -> None:
    server = mock_server()
    assert complete(server, 1).headers["x-trace-sampled"] == "0"
    asked = complete(server, 1, f"00-{TRACE}-{PARENT}-01")
    assert asked.headers["x-trace-sampled"] == "1", "it is the client's choice"


def served(name: str) -> Sequence:
    request = Request(
        id=name,
        prompt_ids=(1,),
        sampling=SamplingParams(),
        max_tokens=9,
        seed=0,
        arrival=0.0,
        trace=f"00-{TRACE}-{NO_PARENT}-01",
    )
    return Sequence(request, 0, fingerprint=b"")


def of_steps(collector: Collector) -> list[Any]:
    return [span for span in collector.spans if span.name == "step"]


def test_a_step_is_linked_to_the_requests_that_it_served(collector: Collector) -> None:
    with server(collector.endpoint, sample_ratio=1.0, step_every=4, delay=0.01) as made:
        body = {"model": "mock", "prompt": ["one", "two", "three"], "max_tokens": 12, "n": 2}
        answer = httpx.post(f"{made.url}/v1/completions", json=body, timeout=30)
        trace = answer.headers["x-trace-id"]
    roots = {span.span_id for span in collector.of(trace) if not span.parent_span_id}
    assert len(roots) == 3
    steps = of_steps(collector)
    assert len(steps) >= 3
    assert [attributes(span)["ryzanstein.step"] % 4 for span in steps] == [3] * len(steps)
    for span in steps:
        assert not span.parent_span_id
        assert span.trace_id.hex() != trace
        assert {link.span_id for link in span.links} == roots
        assert {link.trace_id.hex() for link in span.links} == {trace}
        said = attributes(span)
        assert said["ryzanstein.why"] == "one in many"
        assert said["ryzanstein.decode_rows"] == 6
        lasted = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert 0.01 < lasted < 1
    assert len({span.trace_id for span in steps}) == len(steps)
    choices = [
        attributes(span)["ryzanstein.choice"]
        for span in collector.of(trace)
        if span.name == "decode"
    ]
    assert sorted(choices) == [0, 0, 0, 1, 1, 1]


def test_a_slow_step_is_always_a_span(collector: Collector) -> None:
    settings = {"step_every": 0, "slow_step_seconds": 0.05, "sample_ratio": 0.0}
    with server(collector.endpoint, delay=0.001, **settings) as made:
        complete(made, 3)
    assert not of_steps(collector)
    with server(collector.endpoint, delay=0.06, **settings) as made:
        trace = complete(made, 3).headers["x-trace-id"]
    steps = of_steps(collector)
    assert len(steps) == 3
    for span in steps:
        assert attributes(span)["ryzanstein.why"] == "slow"
        (link,) = span.links
        assert link.trace_id.hex() == trace
    assert len({span.links[0].span_id for span in steps}) == 1


def test_a_step_that_ran_on_without_a_request_leaves_nothing_of_it(collector: Collector) -> None:
    """Planned before it ended: its span is made, and no other will know its id."""
    engine, _ = mock_engine()
    row = served("r")
    settings = TracingSection(endpoint=collector.endpoint, step_every=1)
    tracing = Tracing(engine, Timelines(lambda: 0.0), settings)
    tracing.on_step(step(0.0, rows=1, step=0, served=[row]))
    assert set(tracing._linked) == {"r"}
    row.finish_reason = "stop"
    tracing.on_request(ended("r", 0.02))
    for number in (1, 2):
        tracing.on_step(step(0.02 * number, rows=1, step=number, served=[row]))
    tracing.close()
    assert not tracing._linked
    assert [len(span.links) for span in of_steps(collector)] == [1, 1, 0]


async def test_tracing_takes_far_less_than_150_microseconds_a_step(collector: Collector) -> None:
    """Of the processor's time at 32 streams: of every step, and of one that is made a span."""
    engine, _ = mock_engine()
    rows = [served(f"r{number}") for number in range(32)]
    steps = [step(0.02 * number, rows=32, step=number, served=rows) for number in range(1000)]
    best = {1000: 1.0, 1: 1.0}
    for every in best:
        timelines = Timelines(lambda: 0.0)
        settings = TracingSection(endpoint=collector.endpoint, step_every=every)
        tracing = Tracing(engine, timelines, settings)
        for _ in range(3):
            with untraced():
                begin = time.thread_time()
                for stats in steps:
                    timelines.on_step(stats)
                    tracing.on_step(stats)
                spent = time.thread_time() - begin
            best[every] = min(best[every], spent / len(steps))
        tracing.close()
    print({every: f"{1e6 * seconds:.1f} us" for every, seconds in best.items()})
    assert best[1000] < 20e-6
    assert best[1] < 5e-4


def test_spans_that_wait_have_a_bound_and_what_is_beyond_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a collector that takes its time, and then is gone."""
    go_on = threading.Event()

    class Gone(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            go_on.wait(20)
            raise OSError("it is gone")

    counted = Counted(Gone())
    waiting = Waiting(counted)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(waiting)
    tracer = provider.get_tracer("test")
    for _ in range(MOST_WAITING + 7):
        tracer.start_span("one").end()
    assert (waiting.count, waiting.dropped) == (MOST_WAITING, 7)
    go_on.set()
    provider.shutdown()
    assert (waiting.count, counted.lost, counted.sent) == (0, MOST_WAITING, 0)
    assert counted.exports["failed",] >= 4
    assert "it is gone" in caplog.text


def test_a_collector_that_is_not_there_costs_a_counter() -> None:
    """Nothing listens at the endpoint; requests are as quick as ever and the server ends soon."""
    with server("http://127.0.0.1:9/v1/traces", sample_ratio=1.0) as made:
        begun = time.monotonic()
        for _ in range(50):
            assert complete(made, 2).status_code == 200
        assert time.monotonic() - begun < 5
        made.wait_for_metric('ryzanstein_spans_total{outcome="lost"}', 1, seconds=30)
        begun = time.monotonic()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "given",
    ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-x-01"],
)
def test_a_traceparent_that_is_none_begins_a_new_trace(given: str) -> None:
    version, trace, parent, flags = trace_of({"traceparent": given}).split("-")
    assert (version, parent, flags) == ("00", NO_PARENT, "00")
    assert len(trace) == 32
    assert trace != TRACE
