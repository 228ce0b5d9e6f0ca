"""Who may speak to the server: host, origin, key and body size are checked before any handler.

Local is not safe: any web page can send requests, and open sockets, to localhost. A page's `Origin`
has to be the server's own or an allowed one, and `Host` has to name this server, or a page could
rebind its own name to 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.config import ServerSection
from server.errors import MESSAGES_PATH, HTTPError, error_response
from server.journal import bind
from server.tenants import Directory, owner_of
from server.tracing import is_sampled, trace_of

logger = logging.getLogger("ryzanstein.server")

FILES_PATH = "/v1/files"
OPEN_PATHS = ("/", "/health/live", "/health/ready", "/metrics")
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# What OpenAI's own clients call it in browsers.
KEY_PROTOCOL = "openai-insecure-api-key."
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware. Also gives every request an id, echoed in `x-request-id`, and says by
    `rates` what its tenant may still ask for."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSection,
        directory: Directory,
        rates: Callable[[str], dict[str, str]],
        sampler: TraceIdRatioBased,
        max_file_bytes: int = 0,
    ) -> None:
        self._app = app
        self._rates = rates
        self._sampler = sampler
        self._directory = directory
        self._hosts = allowed_hosts(settings)
        self._origins = settings.allowed_origins
        self._max_body = settings.max_body_bytes
        self._max_file = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        trace = trace_of(headers, self._sampler)
        scope.setdefault("state", {}).update(request_id=request_id, trace=trace)
        bind(request_id, trace)
        send = self._with_headers(send, scope, request_id)
        try:
            self._check(scope, headers)
            if scope["type"] == "http":
                files = scope["path"] == FILES_PATH
                most = max(self._max_body, self._max_file) if files else self._max_body
                receive = _limit_body(headers, receive, most)
        except HTTPError as error:
            if scope["type"] == "websocket":
                await refuse_socket(scope, receive, send, error)
            else:
                await error_response(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and not self._answers_for(_name(host)):
            raise HTTPError(
                403,
                f"this server does not answer for the host {host[:100]!r}; "
                "add it to server.allowed_hosts",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._origin_allowed(origin, host):
            raise HTTPError(
                403,
                f"pages from {origin[:100]!r} may not use this server; "
                "add the origin to server.allowed_origins",
                code="origin_not_allowed",
            )
        # The page itself is no secret; what it asks for needs a key.
        if scope["path"] in OPEN_PATHS or scope["path"].startswith("/console/"):
            return
        key = _key(headers)
        tenant = "" if self._directory.is_open else self._directory.tenant_of(key)
        if tenant is None:
            raise HTTPError(
                401,
                "a valid API key is needed: send 'Authorization: Bearer KEY', or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        scope["state"]["tenant"] = tenant
        open_to_all = self._directory.is_open
        digest = "" if open_to_all else hashlib.sha256(key.encode()).hexdigest()
        scope["state"].update(key=digest, owner=owner_of(tenant, digest))

    def _answers_for(self, name: str) -> bool:
        """Whether this is a host's name, or any address: no page can have one of those rebound."""
        assert self._hosts is not None
        return name in self._hosts or name == "localhost" or _address(name) is not None

    def _with_headers(self, send: Send, scope: Scope, request_id: str) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                trace = scope["state"]["trace"]
                more = {
                    "x-request-id": request_id,
                    "x-trace-id": trace.split("-")[1],
                    "x-trace-sampled": f"{is_sampled(trace):d}",
                }
                if scope["path"].startswith(MESSAGES_PATH):
                    more["request-id"] = request_id  # Anthropic's name for it
                tenant = scope["state"].get("tenant")
                if tenant is not None and scope["path"].startswith("/v1/"):
                    more |= self._rates(tenant)
                headers: Sequence[tuple[bytes, bytes]] = message.get("headers", ())
                added = [(name.encode(), value.encode()) for name, value in more.items()]
                message["headers"] = [*headers, *added]
            await send(message)

        return wrapped

    def _origin_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False


def _limit_body(headers: Headers, receive: Receive, most: int) -> Receive:
    """Refuse bodies of more than `most` bytes."""
    too_large = HTTPError(
        413,
        f"the body is larger than {most} bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise too_large
        return message

    return limited


def allowed_hosts(settings: ServerSection) -> set[str] | None:
    """Names that `Host` may have; None (any) on a public address without a list, or with `*`."""
    if "*" in settings.allowed_hosts:
        return None
    if settings.allowed_hosts:
        return {name.lower() for name in settings.allowed_hosts}
    if is_local(settings.host):
        return {*LOCAL_NAMES, settings.host.lower()}
    return None


def is_local(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _key(headers: Headers) -> str:
    """The key that came with a request: OpenAI's way, Anthropic's, or that of a page's WebSocket,
    which can set no headers but may offer subprotocols."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    for offered in headers.get("sec-websocket-protocol", "").split(","):
        if offered.strip().startswith(KEY_PROTOCOL):
            return offered.strip().removeprefix(KEY_PROTOCOL)
    return headers.get("x-api-key", "").strip()


def _name(host: str) -> str:
    """The host without its port: `[::1]:8000` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def refuse_socket(scope: Scope, receive: Receive, send: Send, error: HTTPError) -> None:
    """Answer the handshake with the error's status and body, where the server can."""
    logger.info("refused a WebSocket: %s", error)
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    response = error_response(error)
    start = {"type": "websocket.http.response.start", "status": response.status_code}
    await send({**start, "headers": response.raw_headers})
    await send({"type": "websocket.http.response.body", "body": bytes(response.body)})
