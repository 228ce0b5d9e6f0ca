"""Requests that let the mock model call the other server's tools."""

from __future__ import annotations

from typing import Any

import openai

TOOL: dict[str, Any] = {"type": "mcp", "server_label": "it", "require_approval": "never"}
WEATHER = TOOL | {"allowed_tools": ["weather"]}


def ask(client: openai.OpenAI, **more: Any) -> Any:
    """The mock is made to call in its first turn, and writes letters in its second."""
    options: dict[str, Any] = {
        "model": "mock",
        "input": "hi",
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }
    return client.responses.create(**options | more)
