"""Tenants and terms over HTTP: whose request it is, and when it is due."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import ConfigError
from server.batches.database import Database
from server.tenants import Directory
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

FILE = """
[tenants.a]
keys = ["key-a"]
weight = 2
[tenants.b]
keys = ["sha256:{digest}"]
tokens_per_second = 1
"""


def write(folder: Path) -> Path:
    file = folder / "tenants.toml"
    file.write_text(FILE.format(digest=hashlib.sha256(b"key-b").hexdigest()))
    return file


def ask(server: ServerProcess, key: str, prompt: str = "hello", **more: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "mock", "prompt": prompt, "max_tokens": 4, "ignore_eos": True} | more
    return httpx.post(f"{server.url}/v1/completions", headers=headers, json=body)


def cached(response: httpx.Response) -> int:
    tokens: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_a_key_is_a_tenant_whose_cache_nobody_else_sees(
    mock_server: MockFactory, tmp_path: Path
) -> None:
    server = mock_server({"tenants_file": str(write(tmp_path))})
    prompt = "a beginning that could be shared"
    assert ask(server, "nobody").status_code == 401
    assert ask(server, f"sha256:{hashlib.sha256(b'key-b').hexdigest()}").status_code == 401
    assert cached(ask(server, "key-a", prompt)) == 0
    assert cached(ask(server, "key-b", prompt)) == 0
    assert cached(ask(server, "key-a", prompt)) == len(prompt) - 1


def test_what_a_tenant_stored_is_there_for_all_of_its_keys(
    mock_server: MockFactory, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.a]\nkeys = ["old", "new"]\n[tenants.b]\nkeys = ["other"]\n')
    server = mock_server({"tenants_file": str(file)})

    def stored(key: str, path: str = "", **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        method = "POST" if more else "GET"
        url = f"{server.url}/v1/responses{path}"
        return httpx.request(method, url, headers=headers, json=more or None)

    made = stored("old", model="mock", input="a", max_output_tokens=4).json()["id"]
    assert stored("new", f"/{made}").status_code == 200
    assert stored("other", f"/{made}").status_code == 404


def test_a_rate_that_is_used_up_is_429_with_the_time_to_wait(
    mock_server: MockFactory, tmp_path: Path
) -> None:
    server = mock_server({"tenants_file": str(write(tmp_path))})
    assert ask(server, "key-b", "x" * 30).status_code == 200
    refused = ask(server, "key-b")
    assert refused.status_code == 429
    assert 15 <= int(refused.headers["retry-after"]) <= 26
    assert "1 tokens/s" in refused.json()["error"]["message"]
    assert ask(server, "key-a").status_code == 200


def test_the_file_is_read_again_and_a_wrong_one_changes_nothing(
    mock_server: MockFactory, tmp_path: Path
) -> None:
    file = write(tmp_path)
    server = mock_server({"tenants_file": str(file)})
    file.write_text("[tenants.a]\nkeys = []\n")
    assert "tenants stay as they were" in server.wait_for("stay as they were")
    assert ask(server, "key-a").status_code == 200
    file.write_text('[tenants.c]\nkeys = ["key-c"]\n')
    end = time.monotonic() + 10
    while ask(server, "key-c").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert ask(server, "key-a").status_code == 401


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tenants.a]\nkeys = 3", "keys"),
        ("[tenants.a]\nkeys = ['x']\nweight = 0", "weight"),
        ("[tenants.a]\nkeys = ['x']\nlimit = 1", "limit"),
        ("[tenants.a]\nkeys = ['x']\n[tenants.b]\nkeys = ['x']", "another tenant has"),
        ("[tenants", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_sentence_at_start(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Directory((), file)
    with pytest.raises(ConfigError, match="cannot read"):
        Directory((), tmp_path / "nothing.toml")


def test_deadlines_are_408_and_are_refused_early_where_they_cannot_be_met(
    mock_server: MockFactory,
) -> None:
    server = mock_server(delay=0.02)
    late = ask(server, "none", max_tokens=150, deadline_ms=300)
    assert late.status_code == 408
    assert late.json()["error"]["code"] == "deadline_exceeded"
    hopeless = ask(server, "none", prompt="x" * 100, deadline_ms=0.1)
    assert hopeless.status_code == 408
    assert "prompt alone takes" in hopeless.json()["error"]["message"]
    headers = {"x-slo-ttft-ms": "soon"}
    body = {"model": "mock", "prompt": "hello"}
    wrong = httpx.post(f"{server.url}/v1/completions", headers=headers, json=body)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-slo-ttft-ms")
    headers = {"x-slo-ttft-ms": "5000"}
    fine = httpx.post(f"{server.url}/v1/completions", headers=headers, json=body)
    assert fine.status_code == 200


def test_a_file_of_tenants_is_never_an_open_door(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants]\n")
    directory = Directory((), file)
    assert not directory.is_open
    assert directory.tenant_of("") is None
    for key in ("", "sha256:12", "sha256:" + "g" * 64):
        file.write_text(f"[tenants.a]\nkeys = [{key!r}]\n")
        with pytest.raises(ConfigError, match="empty, or a digest"):
            Directory((), file)


def test_what_belonged_to_keys_belongs_to_their_tenants(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"key-a").hexdigest()
    database = Database(tmp_path / "batches.sqlite")
    kept = database.add_file(digest, "in", "batch", b"x")["id"]
    others = database.add_file("somebody", "in", "batch", b"y")["id"]
    owners = Directory(("nameless",), write(tmp_path)).owners
    assert owners[digest] == "tenant a"
    database.adopt(owners)
    assert database.file(kept, "tenant a") is not None
    assert database.file(kept, digest) is None
    assert database.file(others, "somebody") is not None
    database.close()
