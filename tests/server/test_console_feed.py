"""What the console's live view is fed with."""

from __future__ import annotations

import base64
import json

from engine import Decision, StepStats
from server.console import Feed
from tests.mock import mock_engine


async def test_steps_are_added_up_only_while_somebody_looks() -> None:
    engine, _ = mock_engine()
    step = StepStats(
        step=1,
        at=1.0,
        prefill_tokens=3,
        decode_rows=2,
        predicted=0.0,
        running=2,
        waiting=0,
        pages_used=0,
        pages_cached=0,
        pages_total=8,
        preemptions=0,
        seconds={"wait": 0.01},
        decisions=(Decision("preempt", "r", "no free pages", 1.0),),
    )
    async with engine:
        feed = Feed(engine)
        feed.on_step(step)
        assert json.loads(feed.snapshot())["preempted"] == 0
        feed.viewers = 1
        feed._made_at = 0.0
        feed.on_step(step)
        shown = json.loads(feed.snapshot())
    assert (shown["preempted"], shown["step_ms"]) == (1, 10.0)
    assert shown["tokens_per_second"] == 5
    assert set(base64.b64decode(shown["pages"]["cells"])) == {0}
