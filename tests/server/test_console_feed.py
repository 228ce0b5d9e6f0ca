"""What the console's live view is fed with."""

from __future__ import annotations

import base64
import json

from engine import Decision
from server.console import Feed
from tests.mock import mock_engine
from tests.server.stats import step


async def test_steps_are_added_up_only_while_somebody_looks() -> None:
    engine, _ = mock_engine()
    preempted = Decision("preempt", "r", "no free pages", 1.0)
    busy = step(1.0, rows=2, prefill_tokens=3, seconds={"wait": 0.01}, decisions=(preempted,))
    async with engine:
        feed = Feed(engine)
        feed.on_step(busy)
        assert json.loads(feed.snapshot())["preempted"] == 0
        feed.viewers = 1
        feed._made_at = 0.0
        feed.on_step(busy)
        shown = json.loads(feed.snapshot())
    assert (shown["preempted"], shown["step_ms"]) == (1, 10.0)
    assert shown["tokens_per_second"] == 5
    assert set(base64.b64decode(shown["pages"]["cells"])) == {0}
