"""A batch's input: JSON lines, checked before any of them is answered."""

from __future__ import annotations

import json
from typing import Any

import msgspec

MAX_LINES = 50_000
MAX_ERRORS = 100
# As large as a request may be by itself.
MAX_LINE_BYTES = 8 << 20


class Line(msgspec.Struct, frozen=True):
    """One request of a batch."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


_decoder = msgspec.json.Decoder(Line)


def read_lines(content: bytes, endpoint: str) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """The (custom id, body) of every line, and what is wrong with lines, as OpenAI lists it."""
    lines: list[tuple[str, str]] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        if len(text) > MAX_LINE_BYTES:
            message = f"a line has at most {MAX_LINE_BYTES} bytes"
            errors.append(_error("line_too_large", message, number))
            continue
        try:
            line = _decoder.decode(text)
            body = bytes(line.body).decode()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            errors.append(_error("invalid_json_line", str(error), number))
            continue
        if line.custom_id in seen:
            errors.append(
                _error("duplicate_custom_id", f"{line.custom_id[:64]!r} was there before", number)
            )
        elif line.method != "POST" or line.url != endpoint:
            message = f"every line of this batch has method POST and url {endpoint}"
            errors.append(_error("mismatched_endpoint", message, number))
        elif not body.lstrip().startswith("{"):
            errors.append(_error("invalid_request", "the body must be an object", number))
        seen.add(line.custom_id)
        lines.append((line.custom_id, body))
        if len(lines) > MAX_LINES:
            return [], [_error("too_many_lines", f"at most {MAX_LINES} are allowed", None)]
        if len(errors) >= MAX_ERRORS:
            break
    if not lines and not errors:
        errors.append(_error("empty_file", "the file has no lines", None))
    return lines, errors


def answer_line(identifier: str, custom_id: str, status: int, body: Any) -> str:
    """A line of the output."""
    response = {"status_code": status, "request_id": identifier, "body": body}
    line = {"id": identifier, "custom_id": custom_id, "response": response, "error": None}
    return msgspec.json.encode(line).decode()


def expired_line(identifier: str, custom_id: str) -> str:
    """A line of the output for one that was not answered in time."""
    error = {"code": "batch_expired", "message": "the batch's window ended before its turn came"}
    line = {"id": identifier, "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(line)


def _error(code: str, message: str, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": line}
