"""Input files of batches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.batches.lines import MAX_LINE_BYTES, MAX_LINES, read_lines

URL = "/v1/completions"


def line(**changes: Any) -> bytes:
    fields = {"custom_id": "a", "method": "POST", "url": URL, "body": {"x": 1}} | changes
    return json.dumps(fields).encode()


def test_lines_are_read_in_order_and_empty_ones_passed_over() -> None:
    content = b"\n".join([line(), b"", line(custom_id="b", body={"y": "ü"}), b"  ", b""])
    assert read_lines(content, URL) == ([("a", '{"x": 1}'), ("b", '{"y": "\\u00fc"}')], [])


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (b"", "empty_file", None),
        (line() + b"\n{", "invalid_json_line", 2),
        (line() + b'\n{"custom_id": "b"}', "invalid_json_line", 2),
        (line() + b"\n\xff", "invalid_json_line", 2),
        (line(custom_id=3), "invalid_json_line", 1),
        (line() + b"\n" + line(), "duplicate_custom_id", 2),
        (line(url="/v1/other"), "mismatched_endpoint", 1),
        (line(method="GET"), "mismatched_endpoint", 1),
        (line(body=[1]), "invalid_request", 1),
        (b'{"custom_id": "a", "body": ' + b"[" * 100_000, "invalid_json_line", 1),
        (line(body={"x": "y" * MAX_LINE_BYTES}), "line_too_large", 1),
        (b"\n".join(line(custom_id=str(n)) for n in range(MAX_LINES + 1)), "too_many_lines", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_has_its_line(content: bytes, code: str, number: int | None) -> None:
    _, (error, *_) = read_lines(content, URL)
    assert (error["code"], error["line"]) == (code, number)
    assert error["message"]
