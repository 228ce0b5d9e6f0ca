"""Statistics of steps for the tests of whoever listens."""

from __future__ import annotations

from typing import Any

from engine import RequestStats, StepStats


def step(at: float, rows: int = 1, **changes: Any) -> StepStats:
    """A step of 20 ms in which `rows` sequences decode, each 20 ms after its last token; `changes`
    are other fields of it."""
    fields: dict[str, Any] = {
        "step": 0,
        "at": at,
        "prefill_tokens": 0,
        "decode_rows": rows,
        "predicted": 0.02,
        "running": rows,
        "waiting": 0,
        "pages_used": 1,
        "pages_cached": 0,
        "pages_total": 8,
        "preemptions": 0,
        "seconds": {"wait": 0.02, "forward": 0.018},
        "gaps": {0.02: rows} if rows else {},
    }
    return StepStats(**fields | changes)


def ended(name: str, finished: float, **changes: Any) -> RequestStats:
    """A request that came at 0 and never began; `changes` are other fields of it."""
    fields: dict[str, Any] = {
        "id": name,
        "tenant": "",
        "arrival": 0.0,
        "first_scheduled": None,
        "first_token": None,
        "finished": finished,
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "completion_tokens": 0,
        "preemptions": 0,
        "finish_reason": "stop",
    }
    return RequestStats(**fields | changes)
