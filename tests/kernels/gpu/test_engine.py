"""The whole engine on the GPU backend, in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine.execution.rank
import engine.loading
from engine import AsyncEngine, SamplingParams
from engine.scheduling.cost import Profile
from kernels.gpu.backend import GpuBackend
from tests.kernels.gpu.filled import HOST
from tests.tiny import write_llama

SETTINGS: dict[str, Any] = {
    "cache__page_size": 4,
    "cache__tokens": 64,
    "scheduler__max_batch_tokens": 16,
    "scheduler__max_running": 2,
    "model__max_context": 48,
    "model__dtype": "float32",
}


async def text_of(folder: Path, **changes: Any) -> list[list[int]]:
    """Token ids of requests that share a beginning; one has penalties and logprobs."""
    prompt = list(range(30, 39))
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    penalized = SamplingParams(max_tokens=3, temperature=0.0, repetition_penalty=1.8, logprobs=1)
    async with AsyncEngine.from_pretrained(str(folder), **(SETTINGS | changes)) as served:
        found = []
        for tail, params in (([1], greedy), ([2, 3], penalized)):
            ids: list[int] = []
            async for delta in served.generate(prompt + tail, params):
                ids += delta.token_ids
            found.append(ids)
        return found


# Of padding, which nobody reads; the step thread does not see the suite's other setting.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_the_engine_streams_the_references_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path)
    wanted = await text_of(folder, execution__backend="reference")
    backend = GpuBackend("float32", "float32", HOST)
    chosen = (backend, "float32")
    monkeypatch.setattr(engine.execution.rank, "select_backend", lambda *_, **__: chosen)
    # The interpreter's times say nothing of a device's.
    profile = Profile((1, 1001), (0.001, 1.001), 0.0, 0.0, 0.0)
    monkeypatch.setattr(engine.loading, "load_or_measure", lambda *_, **__: profile)
    assert await text_of(folder) == wanted
