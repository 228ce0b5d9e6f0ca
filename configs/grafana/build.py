"""Writes the dashboards beside this file: `python configs/grafana/build.py`.

One row a panel: title, unit, and queries by legend. `$job` and `$instance` choose servers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.runtime import UnknownDataquery
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FOLDER = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TRACES = DataSourceRef(type_val="jaeger", uid="${traces}")
ON = '{job=~"$job", instance=~"$instance"}'
RATE = "[$__rate_interval]"


def on(name: str, more: str = "") -> str:
    """A metric of the chosen servers."""
    inner = ON[1:-1] + (f", {more}" if more else "")
    return f"ryzanstein_{name}{{{inner}}}"


def rate(name: str, more: str = "", by: str = "") -> str:
    """A counter's growth a second, over all chosen servers or by a label."""
    return f"sum {f'by ({by}) ' if by else ''}(rate({on(name, more)}{RATE}))"


def quantile(share: float, name: str, by: str = "") -> str:
    """Of a histogram."""
    labels = ", ".join(filter(None, ["le", by]))
    return f"histogram_quantile({share}, sum by ({labels}) (rate({on(name + '_bucket')}{RATE})))"


def quantiles(name: str) -> dict[str, str]:
    """Median, 90th, 99th."""
    return {f"p{round(100 * share)}": quantile(share, name) for share in (0.5, 0.9, 0.99)}


def within(name: str, bound: str) -> str:
    """The share of a histogram's observations up to one of its bounds."""
    below = rate(f"{name}_bucket", f'le="{bound}"')
    return f"{below} / {rate(f'{name}_count')}"


Panel = tuple[str, str, dict[str, str]]

OVERVIEW: list[Panel] = [
    ("State", "none", {"{{state}}": f"{on('engine_state')} == 1"}),
    (
        "Requests finished a second",
        "reqps",
        {"{{reason}}": rate("requests_finished_total", by="reason")},
    ),
    (
        "Tokens a second",
        "none",
        {
            "prompt": rate("prompt_tokens_total"),
            "of it cached": rate("cached_tokens_total"),
            "output": rate("output_tokens_total"),
        },
    ),
    (
        "Running and waiting",
        "none",
        {
            "running": f"sum({on('requests_running')})",
            "waiting": f"sum({on('requests_waiting')})",
        },
    ),
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Time between tokens", "s", quantiles("inter_token_seconds")),
    ("KV cache in use", "percentunit", {"{{instance}}": on("kv_usage_ratio")}),
    (
        "Answers by path and status",
        "reqps",
        {
            "{{path}} {{status}}": rate("http_requests_total", by="path, status"),
        },
    ),
]
LATENCY: list[Panel] = [
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    (
        "First tokens within 2.5 s",
        "percentunit",
        {
            "share": within("time_to_first_token_seconds", "2.5"),
        },
    ),
    ("Time between tokens", "s", quantiles("inter_token_seconds")),
    (
        "Tokens within 250 ms of the last",
        "percentunit",
        {
            "share": within("inter_token_seconds", "0.25"),
        },
    ),
    ("In the queue", "s", quantiles("queue_seconds")),
    ("From first step to first token", "s", quantiles("prefill_seconds")),
    ("Whole answers", "s", quantiles("request_seconds")),
    ("Over HTTP, whatever the path", "s", quantiles("http_request_seconds")),
    (
        "Error budget burnt, times what 99.9% allows",
        "none",
        {
            "{{kind}}, 1 h": 'ryzanstein:error_ratio:rate1h{job=~"$job"} / 0.001',
            "{{kind}}, 6 h": 'ryzanstein:error_ratio:rate6h{job=~"$job"} / 0.001',
        },
    ),
    (
        "Latency budget burnt, times what 99% allows",
        "none",
        {
            "{{kind}}, 1 h": 'ryzanstein:slow_ratio:rate1h{job=~"$job"} / 0.01',
            "{{kind}}, 6 h": 'ryzanstein:slow_ratio:rate6h{job=~"$job"} / 0.01',
        },
    ),
]
SCHEDULER: list[Panel] = [
    ("Sequences a step", "none", quantiles("step_sequences")),
    ("Tokens a step", "none", quantiles("step_tokens")),
    ("Steps", "s", quantiles("step_duration_seconds")),
    ("Time in steps by part", "percentunit", {"{{part}}": rate("step_seconds_total", by="part")}),
    ("Error of the cost model", "percentunit", {"{{instance}}": on("step_prediction_error")}),
    (
        "KV pages",
        "none",
        {
            "used": f"sum({on('kv_pages_used')})",
            "cached": f"sum({on('kv_pages_cached')})",
            "parked": f"sum({on('kv_pages_parked')})",
            "all": f"sum({on('kv_pages')})",
        },
    ),
    (
        "Prompt tokens found in the cache",
        "percentunit",
        {
            "share": f"{rate('cached_tokens_total')} / {rate('prompt_tokens_total')}",
        },
    ),
    (
        "Pages forgotten a second",
        "none",
        {"for {{reason}}": rate("kv_evictions_total", by="reason")},
    ),
    (
        "Pages to and from the cold tier a second",
        "none",
        {"{{way}}": rate("kv_cold_pages_total", by="way")},
    ),
    ("Sent back to the queue a second", "none", {"all": rate("preemptions_total")}),
    (
        "Guessed tokens a second",
        "none",
        {
            "guessed": rate("draft_tokens_total"),
            "right": rate("accepted_draft_tokens_total"),
        },
    ),
    ("Waiting tokens", "none", {"{{instance}}": on("waiting_tokens")}),
    (
        "Steps with the weights for busy times",
        "percentunit",
        {"share": f"{rate('busy_steps_total')} / {rate('steps_total')}"},
    ),
]
TENANTS: list[Panel] = [
    (
        "Output tokens a second",
        "none",
        {
            "{{tenant}}": rate("tenant_tokens_total", 'kind="output"', by="tenant"),
        },
    ),
    (
        "Prompt tokens a second",
        "none",
        {
            "{{tenant}}": rate("tenant_tokens_total", 'kind="prompt"', by="tenant"),
        },
    ),
    ("Waiting", "none", {"{{tenant}}": f"sum by (tenant) ({on('tenant_waiting')})"}),
    (
        "Refused a second",
        "reqps",
        {
            "{{tenant}}: {{reason}}": rate("requests_refused_total", by="tenant, reason"),
        },
    ),
]
HARDWARE: list[Panel] = [
    (
        "Processor time of the server, cores",
        "none",
        {
            "{{instance}}": f"rate(process_cpu_seconds_total{ON}{RATE})",
            "{{instance}}: event loop": f"rate({on('loop_cpu_seconds_total')}{RATE})",
        },
    ),
    ("Memory of the server", "bytes", {"{{instance}}": f"process_resident_memory_bytes{ON}"}),
    ("Memory of the GPU", "bytes", {"{{instance}} {{kind}}": on("gpu_memory_bytes")}),
    ("Lag of the event loop", "s", quantiles("loop_lag_seconds")),
    ("Open descriptors", "none", {"{{instance}}": f"process_open_fds{ON}"}),
    ("Connections", "none", {"{{kind}}": f"sum by (kind) ({on('connections')})"}),
    ("Clients that left early, a second", "none", {"all": rate("clients_left_total")}),
    (
        "Losses of the model's ranks",
        "none",
        {"{{instance}}": f"increase({on('rank_losses_total')}[1h])"},
    ),
    ("Started", "dateTimeFromNow", {"{{instance}}": f"1000 * process_start_time_seconds{ON}"}),
]
# What became of spans that did not arrive.
OUTCOMES = 'outcome=~"lost|dropped"'
TRACING: list[Panel] = [
    ("Traces made a second, by why", "none", {"{{why}}": rate("traces_total", by="why")}),
    (
        "Share of answers that are traced",
        "percentunit",
        {
            "share": " / ".join(
                [rate("traces_total", 'why!="step"'), rate("requests_finished_total")]
            ),
        },
    ),
    ("Spans a second", "none", {"{{outcome}}": rate("spans_total", by="outcome")}),
    (
        "Spans that did not arrive, in an hour",
        "none",
        {
            "{{outcome}}": f"sum by (outcome) (increase({on('spans_total', OUTCOMES)}[1h]))",
        },
    ),
    ("Exports a second", "none", {"{{outcome}}": rate("span_exports_total", by="outcome")}),
    (
        "Exports that failed",
        "percentunit",
        {
            "share": " / ".join(
                [rate("span_exports_total", 'outcome="failed"'), rate("span_exports_total")]
            ),
        },
    ),
    ("Spans that wait for the collector", "none", {"{{instance}}": on("spans_waiting")}),
    (
        "Slowest steps and answers",
        "s",
        {
            "steps, p99": quantile(0.99, "step_duration_seconds"),
            "answers, p99": quantile(0.99, "request_seconds"),
        },
    ),
]
DASHBOARDS: dict[str, tuple[str, list[Panel]]] = {
    "overview": ("Ryzanstein: overview", OVERVIEW),
    "latency": ("Ryzanstein: latency and objectives", LATENCY),
    "scheduler": ("Ryzanstein: scheduler and KV cache", SCHEDULER),
    "tenants": ("Ryzanstein: tenants", TENANTS),
    "hardware": ("Ryzanstein: machine and process", HARDWARE),
    "tracing": ("Ryzanstein: traces", TRACING),
}


def build(name: str) -> str:
    """One dashboard as JSON."""
    title, panels = DASHBOARDS[name]
    board = (
        dashboard.Dashboard(title)
        .uid(f"ryzanstein-{name}")
        .tags(["ryzanstein"])
        .refresh("10s")
        .time("now-1h", "now")
        .link(dashboard.DashboardLink("Ryzanstein").type("dashboards").tags(["ryzanstein"]))
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_variable("job", "label_values(ryzanstein_build_info, job)"))
        .with_variable(
            _variable("instance", 'label_values(ryzanstein_build_info{job=~"$job"}, instance)')
        )
    )
    for label, unit, queries in panels:
        board = board.with_panel(_panel(label, unit, queries))
    if name == "tracing":
        board = (
            board.with_variable(dashboard.DatasourceVariable("traces").type("jaeger"))
            .with_variable(dashboard.TextBoxVariable("slow").default_value("10s"))
            .with_panel(_search("Slow answers", {"minDuration": "$slow"}))
            .with_panel(_search("Slow and sampled steps", {"operation": "step"}))
        )
    text: str = JSONEncoder(sort_keys=True, indent=2).encode(board.build())
    return text + "\n"


def _variable(name: str, query: str) -> Any:
    return (
        dashboard.QueryVariable(name)
        .datasource(SOURCE)
        .query(query)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _panel(title: str, unit: str, queries: dict[str, str]) -> Any:
    kind = stat.Panel if title in ("State", "Started") else timeseries.Panel
    panel: Any = kind().title(title).unit(unit).datasource(SOURCE).span(12).height(8)
    for legend, query in queries.items():
        panel = panel.with_target(prometheus.Dataquery().expr(query).legend_format(legend))
    return panel


class Search:
    """What Jaeger is asked for: the newest traces of the service, one a row."""

    def __init__(self, more: dict[str, str]) -> None:
        self._more = more

    def build(self) -> UnknownDataquery:
        """In the words of Grafana's own Jaeger data source, which the SDK does not know."""
        source = {"type": TRACES.type_val, "uid": TRACES.uid}
        asked = {"queryType": "search", "service": "ryzanstein", "limit": 20, "refId": "A"}
        return UnknownDataquery({"datasource": source, **asked, **self._more})


def _search(title: str, more: dict[str, str]) -> Any:
    return (
        table.Panel().title(title).datasource(TRACES).with_target(Search(more)).span(24).height(9)
    )


def main() -> None:
    """Write them all; with `--check` only say whether they are as they should be."""
    stale = [n for n in DASHBOARDS if not _same(FOLDER / f"{n}.json", build(n))]
    if "--check" in sys.argv:
        sys.exit(f"run {sys.argv[0]}: {', '.join(stale)} differ" if stale else 0)
    for name in stale:
        (FOLDER / f"{name}.json").write_text(build(name))


def _same(file: Path, text: str) -> bool:
    return file.exists() and file.read_text() == text


if __name__ == "__main__":
    main()
