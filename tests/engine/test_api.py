"""The public Python API: its names, and the README's example on a real (tiny) model."""

from __future__ import annotations

from pathlib import Path

import pytest

import engine
from engine import AsyncEngine, ConfigError, SamplingParams, load_config
from tests.tiny import write_llama


def test_the_public_names_are_pinned() -> None:
    assert engine.__all__ == [
        "Allowance",
        "AsyncEngine",
        "Config",
        "ConfigError",
        "DeadlineExceeded",
        "Decision",
        "Delta",
        "EngineClosed",
        "EngineFailed",
        "Grammar",
        "InvalidRequest",
        "Overloaded",
        "QueueProgress",
        "RequestStats",
        "RyzansteinError",
        "SamplingParams",
        "StepStats",
        "Tenant",
        "Terms",
        "TokenLogprob",
        "TokenStream",
        "Usage",
        "load_config",
    ]
    public = {name for name in dir(AsyncEngine) if not name.startswith("_")}
    assert public == {
        "abort",
        "active_requests",
        "add_listener",
        "allowance",
        "chat",
        "check_ids",
        "check_open",
        "configure_tenants",
        "decode",
        "drain",
        "failure",
        "encode",
        "encode_all",
        "end_lease",
        "from_pretrained",
        "generate",
        "health",
        "parts",
        "pause",
        "queue_progress",
        "render_chat",
        "submit",
        "unpause",
    }


async def test_the_readme_example(tmp_path: Path) -> None:
    model = str(write_llama(tmp_path / "model"))
    text = ""
    async with AsyncEngine.from_pretrained(model, cache__tokens=1024) as engine:
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        async for delta in engine.generate("Once upon a time", params):
            text += delta.text
        assert engine.parts.cache_tokens == 1024
    assert text


async def test_a_model_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="neither a path that exists nor a known name"):
        async with AsyncEngine.from_pretrained("no-such-model"):
            pass


def test_settings_are_taken_as_they_are_not_as_text() -> None:
    config = load_config(values={"model.revision": None, "model.name": '/m/\U0001f600 "x"'})
    assert (config.model.revision, config.model.name) == (None, '/m/\U0001f600 "x"')


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="colour"):
        AsyncEngine.from_pretrained("x", cache__colour=1)
