"""What operators are given: every file is checked by its own tool or schema, and by what the server
really says."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import crossplane
import httpx
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from engine import load_config
from tests.server.process import ServerProcess
from tests.server.prometheus import tool

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_compose_file_fits_its_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = CONFIGS / "compose.observability.yaml"
    done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_compose_mounts_and_sets_exists() -> None:
    services = yaml.safe_load((CONFIGS / "compose.observability.yaml").read_text())["services"]
    for name, service in services.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (CONFIGS / source).exists(), f"{name}: {source}"
    settings = [a.removeprefix("--set=") for a in services["ryzanstein"]["command"] if "--set" in a]
    config = load_config(None, settings)
    assert config.logging.format == "json"
    assert "ryzanstein" in config.server.allowed_hosts


def test_the_image_has_two_stages_a_user_without_rights_and_a_health_check() -> None:
    parser = DockerfileParser(path=str(ROOT / "Dockerfile"))
    found = [(i["instruction"], i["value"]) for i in parser.structure]
    stages = [number for number, (name, _) in enumerate(found) if name == "FROM"]
    assert len(stages) == 2
    last = dict(found[stages[1] :])
    assert last["USER"] == "ryzanstein"
    assert "/health/live" in last["HEALTHCHECK"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    for name, value in found:
        if name == "COPY" and "--from" not in value:
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source


def test_the_proxy_passes_streams_and_sockets() -> None:
    parsed = crossplane.parse(str(CONFIGS / "nginx.conf"))
    assert parsed["status"] == "ok", parsed["errors"]
    text = (CONFIGS / "nginx.conf").read_text()
    for line in ("proxy_buffering off;", "proxy_set_header Upgrade $http_upgrade;"):
        assert line in text


def test_the_unit_waits_for_a_drain_and_restarts_what_failed() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(CONFIGS / "ryzanstein.service")
    assert parser["Service"]["Restart"] == "on-failure"
    drain = load_config().server.drain_seconds
    assert float(parser["Service"]["TimeoutStopSec"]) > drain


def test_alerts_reach_somebody() -> None:
    done = subprocess.run(
        [tool("amtool"), "check-config", str(CONFIGS / "alertmanager.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.compose.yml"])
def test_prometheus_takes_its_configuration(name: str) -> None:
    command = [tool("promtool"), "check", "config", str(CONFIGS / "prometheus" / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def paths(mapping: dict[str, Any], before: str = "") -> set[str]:
    """Every field of an index template, with dots."""
    found = set()
    for name, field in mapping.items():
        if "properties" in field:
            found |= paths(field["properties"], f"{before}{name}.")
        else:
            found.add(before + name)
    return found


def flat(entry: dict[str, Any], before: str = "") -> set[str]:
    found = set()
    for name, value in entry.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name}
    return found


def test_the_index_template_knows_every_field_that_is_logged() -> None:
    template = json.loads((CONFIGS / "elk/index-template.json").read_text())
    known = paths(template["template"]["mappings"]["properties"])
    env = {"MOCK_LOGGING": json.dumps({"format": "json", "prompts": True})}
    with ServerProcess(module="tests.server.mock_server", env=env) as server:
        body = {"model": "mock", "prompt": "x", "max_tokens": 2}
        httpx.post(f"{server.url}/v1/completions", json=body)
        httpx.get(f"{server.url}/test/raise")
        server.wait_for("ended:")
        log = server.wait_for("ZeroDivisionError")
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    logged = set().union(*(flat(entry) for entry in entries))
    assert logged <= known, logged - known
    assert {"ryzanstein.prompt", "ryzanstein.answers"} <= logged


def test_filebeat_and_kibana_read_what_they_are_given() -> None:
    filebeat = yaml.safe_load((CONFIGS / "elk/filebeat.yml").read_text())
    index = filebeat["output.elasticsearch"]["index"]
    template = json.loads((CONFIGS / "elk/index-template.json").read_text())
    (pattern,) = template["index_patterns"]
    assert re.fullmatch(pattern.replace("*", ".*"), index)
    lines = (CONFIGS / "elk/kibana-saved-search.ndjson").read_text().splitlines()
    objects = {entry["id"]: entry for entry in map(json.loads, lines)}
    known = paths(template["template"]["mappings"]["properties"])
    search = objects["ryzanstein-failed"]
    assert set(search["attributes"]["columns"]) <= known
    for reference in search["references"]:
        assert reference["id"] in objects


def test_grafana_is_told_where_everything_is() -> None:
    """Each source that a dashboard asks for, at a service of the compose file."""
    for file in (CONFIGS / "grafana/provisioning").rglob("*.yaml"):
        assert yaml.safe_load(file.read_text())["apiVersion"] == 1
    services = yaml.safe_load((CONFIGS / "compose.observability.yaml").read_text())["services"]
    given = yaml.safe_load((CONFIGS / "grafana/provisioning/datasources/sources.yaml").read_text())
    for source in given["datasources"]:
        assert urlsplit(source["url"]).hostname in services
    wanted = set()
    for file in (CONFIGS / "grafana").glob("*.json"):
        variables = json.loads(file.read_text())["templating"]["list"]
        wanted |= {entry["query"] for entry in variables if entry["type"] == "datasource"}
    assert wanted == {source["type"] for source in given["datasources"]} == {"prometheus", "jaeger"}


def test_slow_traces_are_listed_from_jaeger() -> None:
    """Of the service as it names itself, by Grafana's own search."""
    board = json.loads((CONFIGS / "grafana/tracing.json").read_text())
    defined = {entry["name"]: entry for entry in board["templating"]["list"]}
    panels = [panel for panel in board["panels"] if panel["datasource"]["type"] == "jaeger"]
    assert len(panels) == 2
    for panel in panels:
        assert panel["type"] == "table"
        (target,) = panel["targets"]
        assert (target["queryType"], target["datasource"]) == ("search", panel["datasource"])
        assert target["service"] == load_config().tracing.service
        assert target["datasource"]["uid"].strip("${}") in defined
    assert panels[0]["targets"][0]["minDuration"] == "$slow"
    assert float(defined["slow"]["query"].removesuffix("s")) == load_config().tracing.slow_seconds


def test_the_reference_is_what_the_server_describes() -> None:
    command = [sys.executable, "docs/build.py", "--check"]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_metric_that_a_document_names_is_exported() -> None:
    with ServerProcess(module="tests.server.mock_server") as server:
        body = {"model": "mock", "prompt": "x", "max_tokens": 2}
        httpx.post(f"{server.url}/v1/completions", json=body)
        text = httpx.get(f"{server.url}/metrics").text
    exported = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    for document in DOCUMENTS:
        for name in re.findall(r"`(ryzanstein_\w+|process_\w+)", document.read_text()):
            assert name in exported, f"{document.name}: {name}"


def test_every_setting_that_a_document_names_exists() -> None:
    sections = load_config()
    named = re.compile(r"`(model|cache|scheduler|execution|server|logging|tracing)\.(\w+)(?:=|`)")
    for document in DOCUMENTS:
        for section, field in named.findall(document.read_text()):
            assert hasattr(getattr(sections, section), field), f"{document.name}: {section}.{field}"


def test_every_command_of_perf_that_a_document_names_takes_its_options() -> None:
    """The module exists, and its help lists the options."""
    commands = re.compile(r"python -m (perf\.\w+)((?: --[\w-]+(?: [^\s`-][^\s`]*)?)*)")
    seen = set()
    for document in DOCUMENTS:
        for module, options in commands.findall(document.read_text()):
            seen.add((module, tuple(re.findall(r"--[\w-]+", options))))
    assert seen
    for module, options in sorted(seen):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, module
        for option in options:
            assert option in done.stdout, f"{module} {option}"
