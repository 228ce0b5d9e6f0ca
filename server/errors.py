"""Errors as OpenAI's clients expect them: one shape, and HTTP statuses mapped in one place."""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from engine.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    RyzansteinError,
)


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error body."""

    error: ErrorDetail


class HTTPError(Exception):
    """An error that the server itself raises, with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}


def describe(error: Exception) -> tuple[int, ErrorBody, dict[str, str]]:
    """Status, body and extra headers for any exception. Unexpected ones tell no details."""
    headers: dict[str, str] = {}
    message, param = str(error), None
    match error:
        case HTTPError():
            status, code, param, headers = error.status, error.code, error.param, error.headers
        case InvalidRequest():
            status, code, param = 400, error.code, error.param
        case Overloaded():
            status, code = 429, "rate_limit_exceeded"
            headers = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
        case DeadlineExceeded():
            status, code = 408, "deadline_exceeded"
            headers = {"x-should-retry": "false"}  # the same deadline would pass again
        case EngineFailed():
            status, code = 503, "engine_unavailable"
            headers = {"retry-after": "1"}
        case RyzansteinError():
            status, code = 500, "internal_error"
        case _:
            status, code, message = 500, "internal_error", "the server made a mistake; see its log"
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return status, ErrorBody(ErrorDetail(message, kind, param, code)), headers


def error_response(error: Exception) -> Response:
    """An exception as an HTTP response."""
    status, body, headers = describe(error)
    return json_response(body, status, headers)


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Any msgspec-encodable value as a JSON response."""
    return Response(
        msgspec.json.encode(body), status, headers=headers, media_type="application/json"
    )
