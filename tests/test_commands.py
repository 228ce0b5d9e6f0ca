"""Every command and example of the documents is run, or checked by what would run it.

What a reader may type is found in the documents themselves: lines of indented blocks and of shell
fences, and what stands in backticks and begins with a program or an option. A new one that no rule
here knows fails the first test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from pip._internal.commands import create_command
from websockets.sync.client import connect

from engine import load_config
from server.cli import app
from tests.server.process import ServerProcess
from tests.tiny import write_llama

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    *("make", "ryzanstein", "python", "python3", "pip", "curl", "git"),
    *("docker", "useradd", "systemctl", "/opt/ryzanstein/bin/pip", ".venv/bin/ryzanstein"),
)
# Whatever else is typed with options.
OPTIONS = re.compile(r"[\w./-]+ (?:\S+ )*--?[a-zA-Z]")
# Commands that end by themselves, without anything else.
SHORT = r"(\.venv/bin/)?ryzanstein (top|models|version|generate|--help)"
# Blocks that are no commands, by how they begin, and the test that holds them to what they say.
OTHER_BLOCKS = {
    "2 x layers x key/value heads": "test_the_size_of_a_token_is_what_the_cache_takes",
    '{"type": "start"': "test_the_simplest_sockets_events_are_as_shown",
}
# What cannot be run here, why, and which test looks at it instead.
NOT_RUN = {
    "git clone <this repository>": "a placeholder for wherever it is",
    "cd ryzanstein": "goes with the clone",
    "make serve": "downloads a model; its recipe is parsed (test_make_passes_on_what_is_typed)",
    "make test": "is what runs this; its recipe is read by make",
    "make clients": "installs other people's clients; its recipe is read by make",
    "make check": "the formatter, the linter and mypy; its recipe is read by make",
    "make": "the program itself",
    "curl": "the program itself",
    "ryzanstein": "the program itself",
    "pip install": "changes the installation; parsed by pip (test_pip_takes_its_options)",
    "python3 -m venv /opt/ryzanstein": "needs root; see test_the_service_is_where_it_is_installed",
    "/opt/ryzanstein/bin/pip": "needs root; see test_the_service_is_where_it_is_installed",
    "useradd": "needs root; see test_the_service_is_where_it_is_installed",
    "systemctl": "needs systemd; see test_the_service_is_where_it_is_installed",
    "mypy --strict": "is what make check runs, over all sources",
    "py-spy": "looks into a process that hangs; not installed with the server",
    "gdb": "the same, for threads without Python",
    "dmesg": "needs root, and a process that the kernel has killed",
    "docker build": "needs docker; see test_the_image_takes_what_docker_run_gives",
    "docker run": "needs docker; see test_the_image_takes_what_docker_run_gives",
    "docker compose": "needs docker; see test_compose_is_given_its_file",
    "ryzanstein serve": "serves; parsed by the command's own parser",
    "ryzanstein quantize": "writes a model; run by tests/engine/compression, parsed here",
    "ryzanstein prune": "writes a model; run by tests/engine/compression, parsed here",
    "ryzanstein chat": "talks; run by tests/server/test_cli.py, parsed here",
    "python -m perf": "measures for minutes; its options are checked, perf.load is run",
}


def commands_of(text: str) -> Iterator[str]:
    """Commands as a shell would get them, one by one."""
    fences = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks = re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)
    for block in [*fences, *blocks]:
        if not block.strip().startswith(tuple(OTHER_BLOCKS)):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                yield from re.split(r" && |; (?=curl)", re.sub(r"\s+# .*", "", line.strip()))
    for inline in re.findall(r"`([^`\n]+)`", text):
        first = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", inline).split()[0]
        if first in PROGRAMS or inline.startswith("--") or OPTIONS.match(inline):
            yield inline


@cache
def commands() -> list[str]:
    return sorted({found for document in DOCUMENTS for found in commands_of(document.read_text())})


def those(pattern: str) -> list[str]:
    """Commands that begin so; there is at least one, or a test would check nothing."""
    found = [command for command in commands() if re.match(pattern, command)]
    assert found, pattern
    return found


def test_every_command_is_run_or_said_not_to_be() -> None:
    run = re.compile(rf"curl .|python -m (perf|tests)\.|--|{SHORT}")
    used = set()
    for command in commands():
        bare = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
        bare = re.sub(r"^make (?:[A-Z]+=\S+ )+", "make ", bare)
        rules = [rule for rule in NOT_RUN if bare == rule or bare.startswith(f"{rule} ")]
        rules += [rule for rule in NOT_RUN if rule == "python -m perf" and rule in bare]
        used |= {rule for rule in rules if "itself" not in NOT_RUN[rule] or bare == rule}
        assert rules or run.match(bare), f"nothing runs or checks: {command}"
    assert used == set(NOT_RUN), f"no document says these any more: {set(NOT_RUN) - used}"


def test_every_block_is_known() -> None:
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for block in re.findall(r"(?:^    .+\n)+", text, re.MULTILINE):
            first = block.split()[0]
            known = first in PROGRAMS or block.strip().startswith(tuple(OTHER_BLOCKS))
            assert known, f"{document.name}: {block}"
    for test in OTHER_BLOCKS.values():
        assert test in globals()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    env = {"MOCK_ENGINE": json.dumps({"pages": 4096, "context": 2000, "max_batch_tokens": 256})}
    with ServerProcess(module="tests.server.mock_server", env=env) as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("commands") / "tiny"))


def shell(command: str, **env: str) -> str:
    """What a command prints; AssertionError if it fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PATH": path} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_what_asks_a_server_gets_an_answer(server: ServerProcess) -> None:
    """Each curl as it is written, with everything behind its pipe."""
    body = {"model": "mock", "prompt": "x", "max_tokens": 2}
    made = httpx.post(f"{server.url}/v1/completions", json=body).json()["id"]
    for command in those("curl ."):
        here = command.replace("http://127.0.0.1:8000", server.url).replace("smollm2-135m", "mock")
        if here.endswith("| head"):
            here = here.replace("| head", "| sed -n 1,10p")  # reads all, or curl would complain
        said = shell(here.replace("curl ", "curl --fail ", 1), SERVER=server.url, ID=made)
        assert said.strip(), command
        if "stream" in command:
            assert "data: [DONE]" in said
        if "timeline" in command:
            assert json.loads(said)["requests"][0]["segments"]


def test_the_openai_clients_of_the_readme_get_their_answers(
    server: ServerProcess, tmp_path: Path
) -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCUMENTS[0].read_text(), re.DOTALL)
    examples = [code for code in examples if "from openai" in code]
    # The mock writes letters; under a schema, as many as it may.
    wanted = [r"[a-z]{8,}", r'\{\s*"verdict"[^a-z]*(good|bad)",\s*"reason"[^a-z]*[a-z]+"\s*\}']
    for example, pattern in zip(examples, wanted, strict=True):
        script = tmp_path / "example.py"
        here = example.replace("http://127.0.0.1:8000", server.url).replace("smollm2-135m", "mock")
        assert here != example
        script.write_text(here)
        assert re.fullmatch(pattern, shell(f"{sys.executable} {script}").strip())


def test_commands_that_end_by_themselves_are_run(server: ServerProcess, model: str) -> None:

    def run(command: str) -> str:
        here = command.removeprefix(".venv/bin/").replace("http://127.0.0.1:8000", server.url)
        if "top" in here:
            here += " --frames 1 --seconds 0.1" + (
                "" if "--url" in here else f" --url {server.url}"
            )
        if "generate" in here:
            here += f" --model {model} --max-tokens 4"
        return shell(here)

    short = those(SHORT)
    with ThreadPoolExecutor(2) as pool:  # most of their time goes to imports
        for command, said in zip(short, pool.map(run, short), strict=True):
            assert said.strip(), command


def test_the_load_generator_measures_as_it_is_told(server: ServerProcess, tmp_path: Path) -> None:
    (command,) = those(r"python -m perf\.load --url")
    here = command.replace("http://127.0.0.1:8000", server.url)
    shell(f"{here} --requests 8 --json {tmp_path / 'result.json'}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["requests"], result["output_tokens"]) == (8, 8 * 200)


def test_the_simulation_runs_through_its_steps() -> None:
    for command in those(r"python -m tests\.simulation"):
        here = re.sub(r"--steps \d+", "--steps 500", command)
        assert here != command
        assert " steps in " in shell(here)


def parse(tokens: list[str]) -> None:
    """Have the command's own parser read what follows `ryzanstein`; it raises what it would say."""
    _, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert not ignored
    if overrides := bound.arguments.get("set_"):
        known = [override for override in overrides if override != "a.b=c"]
        load_config(bound.arguments.get("config"), known)
    for name in ("config", "tenants"):
        if (file := bound.arguments.get(name)) is not None and str(file) != "FILE":
            assert (ROOT / file).exists(), file


def test_the_command_takes_every_flag_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for command in those(r"(\.venv/bin/)?ryzanstein \w"):
        parse(shlex.split(command)[1:])
    app(["serve", "--help"], result_action="return_value")
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for flags in those("--"):
        tokens = shlex.split(flags)
        if len(tokens) == 1:
            assert flags in known, flags
        else:
            parse(["serve", *tokens])


def test_make_passes_on_what_is_typed() -> None:
    """Every target exists, and what it would run is what the command takes."""
    assert shutil.which("make"), "make is what the README begins with"
    served = []
    for command in those(r"(?:[A-Z_]+=\S+ )*make\b"):
        if command == "make":
            continue
        said = shell(f"{command} --dry-run --always-make")
        served += re.findall(r"^\S+/ryzanstein (serve .*)$", said, re.MULTILINE)
    assert len(served) >= 4
    for line in served:
        parse(shlex.split(line))
    assert any("--port 8123" in line and "gemma3-270m" in line for line in served)


def test_pip_takes_its_options() -> None:
    for command in those(r"(/opt/ryzanstein/bin/)?pip install"):
        tokens = shlex.split(command)[2:]
        _, packages = create_command("install").parse_args(tokens)
        assert packages, command
        for package in packages:
            assert package in (".", "torch", "websockets"), package


def test_the_service_is_where_it_is_installed(tmp_path: Path) -> None:
    """The folder, the user and the unit of the commands are those of the unit's file."""
    unit = (ROOT / "configs/ryzanstein.service").read_text()
    (venv,) = those("python3 -m venv")
    (user,) = those("useradd")
    (enable,) = those("systemctl")
    folder = venv.split()[-1]
    assert those(f"{folder}/bin/pip install \\.")
    (started,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *tokens = shlex.split(started)
    assert program == f"{folder}/bin/ryzanstein"
    config = tokens.pop(tokens.index("--config") + 1)
    tokens.remove("--config")
    parse(tokens)
    assert f"`{config}`" in (ROOT / "docs/deployment.md").read_text()
    assert f"User={user.split()[-1]}\n" in unit
    assert (ROOT / f"configs/{enable.split()[-1]}.service").exists()
    if (analyze := shutil.which("systemd-analyze")) is not None:
        # The same unit, with a program that is here.
        file = tmp_path / "ryzanstein.service"
        file.write_text(unit.replace(program, sys.executable))
        done = subprocess.run(
            [analyze, "verify", "--recursive-errors=no", str(file)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_image_takes_what_docker_run_gives() -> None:
    found = DockerfileParser(path=str(ROOT / "Dockerfile")).structure
    said = {entry["instruction"]: entry["value"] for entry in found}
    (run,) = those("docker run")
    (build,) = those("docker build")
    assert build.split()[-1] == "."
    assert run.split()[-1] == build.split()[build.split().index("-t") + 1]
    tokens = run.split()
    assert tokens[tokens.index("-p") + 1].split(":")[1] == said["EXPOSE"]
    assert tokens[tokens.index("-v") + 1].split(":")[1] == said["VOLUME"]
    assert tokens[tokens.index("-e") + 1] in (ROOT / "server/cli.py").read_text()
    parse(json.loads(said["CMD"]))


def test_compose_is_given_its_file() -> None:
    for command in those(r"docker compose"):
        tokens = command.split()
        services = yaml.safe_load((ROOT / tokens[tokens.index("-f") + 1]).read_text())["services"]
        parse(services["ryzanstein"]["command"])


def test_the_simplest_sockets_events_are_as_shown(server: ServerProcess) -> None:
    """Of docs/websocket.md: the same types in the same order, with the same fields."""
    text = (ROOT / "docs/websocket.md").read_text()
    (block,) = re.findall(r'(?:^    \{"type".+\n)+', text, re.MULTILINE)
    shown = [json.loads(line) for line in block.splitlines()]
    got = []
    with connect(server.url.replace("http", "ws") + "/v1/stream") as socket:
        socket.send(json.dumps({"model": "mock", "prompt": "x", "max_tokens": 3}))
        while not got or got[-1]["type"] != "done":
            got.append(json.loads(socket.recv(10)))
    assert list(dict.fromkeys(event["type"] for event in got)) == [e["type"] for e in shown]
    for event in shown:
        (like, *_) = (other for other in got if other["type"] == event["type"])
        assert set(event) <= set(like), event


def test_the_size_of_a_token_is_what_the_cache_takes() -> None:
    """SmolLM2-135M: 30 layers, 3 heads of 64, bfloat16; an 8B Llama: 32, 8 heads of 128."""
    text = (ROOT / "docs/deployment.md").read_text()
    for size, layers, heads, width in (("23 KB", 30, 3, 64), ("131 KB", 32, 8, 128)):
        assert f"{round(2 * layers * heads * width * 2 / 1e3)} KB" == size
        assert size in text


def test_every_file_of_the_rooms_is_there() -> None:
    """The listing of docs/architecture.md: names of files under their folder."""
    text = (ROOT / "docs/architecture.md").read_text()
    (listing,) = re.findall(r"```\n(kernels/.*?)```", text, re.DOTALL)
    seen = 0
    folders = [ROOT]
    for line in listing.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"(?<!\S)[\w/]+(?:\.py|/)(?!\S)", line):
            path = folders[depth] / name
            assert path.exists(), path
            seen += 1
            if name.endswith("/"):
                folders[depth + 1 :] = [path]
    assert seen > 50
