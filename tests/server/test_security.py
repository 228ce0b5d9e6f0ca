"""Keys, hosts, origins and request ids."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from engine.config import ServerSection
from server.security import allowed_hosts, is_local
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess


def test_pages_of_other_origins_are_refused(mock: ServerProcess) -> None:
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        (f"http://127.0.0.1:{mock.port + 1}", 403),
        (mock.url, 200),
    ):
        response = httpx.get(f"{mock.url}/v1/models", headers={"origin": origin})
        assert response.status_code == status, origin
        if status == 403:
            assert response.json()["error"]["code"] == "origin_not_allowed"


def test_a_name_rebound_to_this_machine_is_refused(mock: ServerProcess) -> None:
    for host, status in (
        ("evil.example", 403),
        ("", 403),
        (f"localhost:{mock.port}", 200),
        (f"[::1]:{mock.port}", 200),
        ("LOCALHOST", 200),
    ):
        response = httpx.get(f"{mock.url}/v1/models", headers={"host": host})
        assert response.status_code == status, host
        if status == 403:
            assert response.json()["error"]["code"] == "host_not_allowed"


def test_allowed_origins_get_cors_headers(mock_server: MockFactory) -> None:
    server = mock_server({"allowed_origins": ["https://app.example"]})
    headers = {"origin": "https://app.example"}
    response = httpx.get(f"{server.url}/v1/models", headers=headers)
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    preflight = httpx.options(
        f"{server.url}/v1/completions",
        headers=headers | {"access-control-request-method": "POST"},
    )
    assert preflight.status_code == 200
    other = httpx.get(f"{server.url}/v1/models", headers={"origin": "https://evil.example"})
    assert other.status_code == 403


def test_keys_guard_everything_but_health_and_metrics(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["secret"]})
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    for headers in ({}, {"authorization": "secret"}, {"authorization": "Basic secret"}):
        response = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    good = {"authorization": "bearer secret"}
    assert httpx.get(f"{server.url}/v1/models", headers=good).status_code == 200
    assert httpx.get(f"{server.url}/nothing", headers=good).status_code == 404


async def test_a_page_brings_its_key_as_a_subprotocol(mock_server: MockFactory) -> None:
    """It can set no headers on a WebSocket."""
    server = mock_server({"api_keys": ["secret"]})
    url = f"ws://127.0.0.1:{server.port}/v1/responses"
    right, wrong = (["ryzanstein.v1", f"openai-insecure-api-key.{k}"] for k in ("secret", "no"))
    offered: Any = right
    async with connect(url, subprotocols=offered) as socket:
        assert socket.subprotocol == "ryzanstein.v1"
        assert "session.created" in str(await socket.recv())
    offered = wrong
    with pytest.raises(InvalidStatus) as caught:
        async with connect(url, subprotocols=offered):
            pass
    assert caught.value.response.status_code == 401
    assert "handshake" not in server.log


def test_request_ids_are_echoed_if_they_are_plain(mock: ServerProcess) -> None:
    def echoed(given: str) -> str:
        response = httpx.get(f"{mock.url}/v1/models", headers={"x-request-id": given})
        return response.headers["x-request-id"]

    assert echoed("my-id:1") == "my-id:1"
    for odd in ("", "two words", "x" * 200):
        assert echoed(odd).startswith("req-")


@pytest.mark.parametrize(
    ("settings", "hosts"),
    [
        (ServerSection(), {"localhost", "127.0.0.1", "::1"}),
        (ServerSection(host="localhost"), {"localhost", "127.0.0.1", "::1"}),
        (ServerSection(host="0.0.0.0"), None),
        (ServerSection(host="0.0.0.0", allowed_hosts=("API.example",)), {"api.example"}),
        (ServerSection(allowed_hosts=("a.example", "*")), None),
    ],
)
def test_allowed_hosts(settings: ServerSection, hosts: set[str] | None) -> None:
    assert allowed_hosts(settings) == hosts


def test_local_addresses() -> None:
    assert all(is_local(h) for h in ("localhost", "127.0.0.1", "127.8.8.8", "::1"))
    assert not any(is_local(h) for h in ("0.0.0.0", "::", "10.0.0.1", "my-machine"))


def test_probes_by_address_are_answered_whatever_names_are_listed(mock_server: MockFactory) -> None:
    server = mock_server({"allowed_hosts": ["models.example"]})
    hosts = {"models.example": 200, "10.1.2.3:8000": 200, "[fd00::1]:80": 200, "other.example": 403}
    for host, status in hosts.items():
        response = httpx.get(f"{server.url}/health/live", headers={"host": host})
        assert response.status_code == status, host
