"""What a client may still ask for, in the headers that OpenAI's clients read."""

from __future__ import annotations

from engine import AsyncEngine

RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}"
    for of in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
)


def rate_headers(engine: AsyncEngine, tenant: str) -> dict[str, str]:
    """The room in the queue, and the tokens of the tenant's rate, or of the queue without one."""
    if engine.health() == "loading":
        return {}
    now = engine.allowance(tenant)
    values = (
        str(now.requests),
        str(now.requests_left),
        duration(now.requests_reset),
        str(now.tokens),
        str(now.tokens_left),
        duration(now.tokens_reset),
    )
    return dict(zip(RATE_HEADERS, values, strict=True))


def duration(seconds: float) -> str:
    """As OpenAI writes them: `20ms`, `6s`, `1m30s`."""
    if seconds < 1:
        return f"{round(seconds * 1e3)}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
