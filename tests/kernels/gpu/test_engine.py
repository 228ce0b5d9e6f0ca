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
from kernels.gpu.program import Graphs
from kernels.gpu.workspace import Bucket
from tests.guesses import guess_all
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


def on_the_gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines compute with the GPU's kernels, and steps are predicted to take what one on a GPU
    might: the interpreter's times say nothing of that."""
    backend = GpuBackend("float32", "float32", HOST)
    chosen = (backend, "float32")
    monkeypatch.setattr(engine.execution.rank, "select_backend", lambda *_, **__: chosen)
    profile = Profile((1, 1001), (0.001, 1.001), 0.0, 0.0, 0.0)
    monkeypatch.setattr(engine.loading, "load_or_measure", lambda *_, **__: profile)


# Of padding, which nobody reads; the step thread does not see the suite's other setting.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_the_engine_streams_the_references_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path)
    wanted = await text_of(folder, execution__backend="reference")
    on_the_gpu_backend(monkeypatch)
    assert await text_of(folder) == wanted


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_guesses_are_decodes_and_do_not_change_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong ones, as many as fit, each a row that reads what those before it wrote."""
    folder = str(write_llama(tmp_path))

    guess_all(monkeypatch)
    buckets: list[Bucket] = []
    run = Graphs.run

    def noted(self: Graphs, key: Any, launches: Any) -> None:
        if isinstance(key, Bucket):
            buckets.append(key)
        run(self, key, launches)

    monkeypatch.setattr(Graphs, "run", noted)
    found = []
    for backend, most in (("reference", 0), ("auto", 7)):
        settings = SETTINGS | {"scheduler__max_running": 8, "scheduler__speculative_tokens": most}
        settings["execution__backend"] = backend
        if most:
            on_the_gpu_backend(monkeypatch)
        async with AsyncEngine.from_pretrained(folder, **settings) as served:
            speculator = served.parts.scheduler.speculator
            speculator.gram = 1
            params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
            deltas = [d async for d in served.generate([200, 100, 50], params)]
            found.append([token for d in deltas for token in d.token_ids])
            assert (speculator.drafted > speculator.accepted > 0) == (most > 0)
    assert found[0] == found[1]
    assert [bucket.decode for bucket in buckets] == [False] + [True] * (len(buckets) - 1)
    assert max(bucket.rows for bucket in buckets[1:]) == 8
    assert len(buckets) < 10
