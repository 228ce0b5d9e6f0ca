"""Traces, received over OTLP by a collector of the test's own."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from server.tracing import NO_PARENT, trace_of
from tests.server.process import ServerProcess

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes what OTLP's exporters send over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, trace: str) -> list[Any]:
        return [span for span in self.spans if span.trace_id.hex() == trace]


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


def test_a_collector_that_is_not_there_costs_a_counter() -> None:
    """Nothing listens at the endpoint; requests are as quick as ever and the server ends soon."""
    with server("http://127.0.0.1:9/v1/traces", sample_ratio=1.0) as made:
        begun = time.monotonic()
        for _ in range(50):
            assert complete(made, 2).status_code == 200
        assert time.monotonic() - begun < 5
        name = 'ryzanstein_spans_total{outcome="lost"}'
        deadline = time.monotonic() + 30
        while made.metric(name) == 0:
            assert time.monotonic() < deadline, "nothing is counted"
            time.sleep(0.2)
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
