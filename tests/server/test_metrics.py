"""Metrics, dashboards and alerts, with a real server and a real Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from server.figures import Histogram, Limited
from server.telemetry import MOST_PENDING, Metrics
from server.traffic import MOST_SERIES, Traffic
from tests.mock import mock_engine
from tests.server.collector import Collector
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess
from tests.server.prometheus import ROOT, Prometheus, tool
from tests.server.stats import ended, step

DASHBOARDS = sorted((ROOT / "configs/grafana").glob("*.json"))
# What this machine has none of.
ABSENT = ("gpu_memory_bytes",)
TENANTS = """
[tenants.quick]
keys = ["quick-key"]
[tenants.poor]
keys = ["poor-key"]
tokens_per_second = 1
"""


def complete(server: ServerProcess, key: str, tokens: int = 8) -> httpx.Response:
    body = {"model": "mock", "prompt": "the same beginning of all prompts", "max_tokens": tokens}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[ServerProcess]:
    """A server that two tenants keep busy, one of them beyond its rate, and that is traced."""
    file = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    file.write_text(TENANTS)
    env = {
        "MOCK_ENGINE": json.dumps({"delay": 0.002}),
        "MOCK_SERVER": json.dumps({"tenants_file": str(file)}),
        "MOCK_TRACING": json.dumps({"endpoint": collector.endpoint, "step_every": 10}),
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        done = threading.Event()

        def work(key: str) -> None:
            while not done.is_set():
                complete(server, key)
                time.sleep(0.01)

        threads = [threading.Thread(target=work, args=(key,)) for key in ("quick-key", "poor-key")]
        for thread in threads:
            thread.start()
        yield server
        done.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def prometheus(
    loaded: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(folder, loaded.url.removeprefix("http://")) as made:
        deadline = time.monotonic() + 30
        while not made.query("ryzanstein:error_ratio:rate1h"):
            assert time.monotonic() < deadline, "nothing is scraped"
            time.sleep(0.5)
        time.sleep(4)  # so that a rate has more than two points
        yield made


def queries(dashboard: Path) -> Iterator[str]:
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel["targets"]:
            if panel["datasource"]["type"] == "prometheus":
                yield target["expr"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_every_dashboard_returns_data(
    prometheus: Prometheus, dashboard: Path
) -> None:
    expressions = list(queries(dashboard))
    assert expressions
    for expression in expressions:
        if any(name in expression for name in ABSENT):
            continue
        chosen = expression.replace("$job", ".*").replace("$instance", ".*")
        found = prometheus.query(chosen.replace("$__rate_interval", "10s"))
        values = [float(series["value"][1]) for series in found]
        assert any(value == value for value in values), f"no data: {expression}"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_what_their_source_makes_and_fit_grafanas_schema(dashboard: Path) -> None:
    Dashboard.from_json(json.loads(dashboard.read_text()))
    script = ROOT / "configs/grafana/build.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True, capture_output=True)


def test_every_series_of_the_rules_is_one_that_the_server_has(prometheus: Prometheus) -> None:
    """An alert on a name that nobody exports would never fire."""
    text = "".join(file.read_text() for file in (ROOT / "configs/prometheus").glob("*s.yaml"))
    names = set(re.findall(r"\bryzanstein_\w+", text))
    assert len(names) > 8
    for name in names:
        assert prometheus.query(name), name


def test_rules_and_their_alerts_pass_promtools_tests() -> None:
    folder = ROOT / "configs/prometheus"
    rules = [str(folder / "objectives.yaml"), str(folder / "alerts.yaml")]
    for arguments in (
        ["check", "rules", *rules],
        ["check", "config", str(folder / "prometheus.yml")],
        ["test", "rules", str(folder / "alerts_test.yaml")],
    ):
        done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_chapter_and_each_chapter_an_alert() -> None:
    text = (ROOT / "configs/prometheus/alerts.yaml").read_text()
    alerts = re.findall(r"alert: (\w+)", text)
    anchors = re.findall(r"runbook: docs/alerts\.md#(\w+)", text)
    assert anchors == [alert.lower() for alert in alerts]
    chapters = re.findall(r"^## (\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert chapters == alerts


def test_the_exposition_passes_promtools_check(loaded: ServerProcess) -> None:
    """But for vLLM's names, which have colons."""
    text = httpx.get(f"{loaded.url}/metrics").text
    ours = "".join(line for line in text.splitlines(True) if "vllm:" not in line)
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=ours, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_vllms_dashboards_find_their_names(loaded: ServerProcess) -> None:
    """The series that vLLM's own Grafana dashboard asks for."""
    families = {f.name: f for f in text_string_to_metric_families(metrics_of(loaded))}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:request_success",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:iteration_tokens_total",
    ):
        assert families[name].samples, name
        assert families[name].samples[0].labels["model_name"] == "mock"
    reasons = {s.labels.get("finished_reason") for s in families["vllm:request_success"].samples}
    assert "length" in reasons


def metrics_of(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/metrics").text


def test_nothing_that_clients_send_becomes_a_label(mock_server: MockFactory) -> None:
    server = mock_server()
    with httpx.Client(base_url=server.url) as client:
        client.get("/v1/models/one")
        before = len(metrics_of(server).splitlines())
        for number in range(100):
            client.get(f"/v1/models/{number}")
            client.get(f"/{number}", headers={"x-request-id": f"id-{number}"})
            client.request(f"M{number}", "/v1/models")
        after = len(metrics_of(server).splitlines())
    assert after - before < 10


def value(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(name)
    assert found is not None, name
    return found


def test_a_scrape_while_torch_is_imported_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    engine, _ = mock_engine()
    names = {metric.name for metric in Metrics(engine, Traffic()).collect()}
    assert "ryzanstein_engine_state" in names


async def test_a_step_is_only_noted_and_added_up_later() -> None:
    engine, _ = mock_engine()
    metrics = Metrics(engine, Traffic())
    async with engine:
        for number in range(3):
            metrics.on_step(step(1.0 + 0.02 * number, rows=4))
        assert metrics._steps.count == 0
        assert value(metrics, "ryzanstein_steps_total") == 3
        assert value(metrics, "ryzanstein_inter_token_seconds_count") == 12
        metrics.on_step(step(1.1, rows=2, gaps={0.02: 1, 7.5: 1}))
        assert value(metrics, "ryzanstein_inter_token_seconds_sum") == pytest.approx(
            13 * 0.02 + 7.5
        )
        for number in range(MOST_PENDING):
            metrics.on_step(step(2.0 + 0.02 * number))
        assert metrics._steps.count == 4 + MOST_PENDING, "what is noted has a bound"


async def test_observing_a_step_takes_less_than_150_microseconds() -> None:
    """Of the processor's time, everything included, at 32 streams."""
    engine, _ = mock_engine()
    metrics = Metrics(engine, Traffic())
    best = 1.0
    async with engine:
        for _ in range(5):
            begin = time.thread_time()
            for number in range(500):
                metrics.on_step(step(0.02 * number, rows=32))
            metrics._drain()
            best = min(best, (time.thread_time() - begin) / 500)
    assert best < 150e-6


def test_histograms_count_into_the_bucket_whose_bound_is_not_below() -> None:
    histogram = Histogram((1.0, 2.0))
    for number, times in ((0.5, 1), (1.0, 2), (1.5, 4), (9.0, 8)):
        histogram.observe(number, times)
    samples = {
        s.labels.get("le", s.name): s.value for s in histogram.family("name", "text").samples
    }
    assert (samples["1.0"], samples["2.0"], samples["+Inf"]) == (3, 7, 15)
    assert samples["name_sum"] == 0.5 + 2 + 6 + 72


def test_labels_have_a_bound() -> None:
    counts = Limited(2)
    for key in ("a", "b", "c", "d", "a"):
        counts.add((key,))
    assert counts == {("a",): 2, ("b",): 1, ("other",): 2}
    assert MOST_SERIES < 1000


def test_a_request_that_never_began_has_no_times(mock_server: MockFactory) -> None:
    engine, _ = mock_engine()
    metrics = Metrics(engine, Traffic())
    metrics.on_request(ended("r", 0.0, tenant="t", prompt_tokens=0, finish_reason="error"))
    assert value(metrics, "ryzanstein_time_to_first_token_seconds_count") == 0
    assert (
        metrics.registry.get_sample_value("ryzanstein_requests_finished_total", {"reason": "error"})
        == 1
    )
