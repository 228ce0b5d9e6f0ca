"""Writes api.md beside this file from the server's own description: `python docs/build.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from server.openapi import document

FILE = Path(__file__).parent / "api.md"
HEAD = """# The HTTP API

Written by `docs/build.py` from what `GET /openapi.json` says. Examples are in the
[README](../README.md), the WebSocket protocol in [websocket.md](websocket.md), the Python API in
`engine/__init__.py` and its docstrings. What cannot be honoured is refused with a 400 that names
the field.

| | |
| --- | --- |
"""


def build() -> str:
    """The whole page."""
    described: dict[str, Any] = json.loads(document("MODEL"))
    lines, bodies = [], []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            lines.append(f"| `{method.upper()} {path}` | {operation['summary']} |")
            body = operation.get("requestBody")
            if body is not None:
                reference = body["content"]["application/json"]["schema"]["$ref"]
                name = reference.rsplit("/", 1)[1]
                if name not in bodies:
                    bodies.append(name)
    text = HEAD + "\n".join(lines) + "\n"
    schemas = described["components"]["schemas"]
    for name in bodies:
        text += f"\n## {name}\n\n| field | type | default |\n| --- | --- | --- |\n"
        required = schemas[name].get("required", [])
        for field, schema in schemas[name]["properties"].items():
            default = json.dumps(schema.get("default"))
            default = "" if field in required or default == "null" else f"`{default}`"
            text += f"| `{field}` | {kind(schema)} | {default} |\n"
    return text


def kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if "anyOf" in schema:
        return " or ".join(kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items') or {})}"
    limits = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "up to"))
        if key in schema
    ]
    return " ".join([str(schema.get("type", "anything")), *limits])


def main() -> None:
    """Write it; with `--check` only say whether it is as it should be."""
    if "--check" in sys.argv:
        sys.exit(0 if FILE.read_text() == build() else f"run {sys.argv[0]}: api.md differs")
    FILE.write_text(build())


if __name__ == "__main__":
    main()
