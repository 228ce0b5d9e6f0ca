"""Errors as OpenAI's clients expect them: one shape, and HTTP statuses mapped in one place."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from engine.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    RyzansteinError,
)

# Well-formed requests that this model in particular cannot take.
UNPROCESSABLE = ("no_chat_template", "chat_template_refused")
MESSAGES_PATH = "/v1/messages"
# Anthropic's names of what went wrong, by status.
MESSAGES_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


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
            if code in UNPROCESSABLE:
                status = 422
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


def messages_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers as Anthropic's clients expect them."""
    status, body, headers = describe(error)
    kind = MESSAGES_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = body.error.message
    if body.error.param is not None and not message.startswith(body.error.param):
        message = f"{body.error.param}: {message}"
    return status, {"type": "error", "error": {"type": kind, "message": message}}, headers


def error_response(error: Exception, path: str = "") -> Response:
    """An exception as an HTTP response, in the shape of the API that `path` belongs to."""
    if path.startswith(MESSAGES_PATH):
        status, body, headers = messages_error(error)
        return json_response(body, status, headers)
    status, detail, headers = describe(error)
    return json_response(detail, status, headers)


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Any msgspec-encodable value as a JSON response."""
    return Response(
        msgspec.json.encode(body), status, headers=headers, media_type="application/json"
    )
