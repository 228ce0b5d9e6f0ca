"""The engine on a model with sliding windows: what it keeps does not change what is said."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine import AsyncEngine, SamplingParams
from tests.tiny import SLIDING, WINDOWS, write_llama

SETTINGS: dict[str, Any] = {
    "cache__page_size": 16,
    "cache__tokens": 2048,
    "scheduler__max_batch_tokens": 32,
    "scheduler__max_running": 3,
    "model__max_context": 400,
    "model__dtype": "float32",
}
SYSTEM = [n % 250 for n in range(60, 230)]
# Requests that begin alike, go on from others, or have nothing in common with any.
PROMPTS = [
    [*SYSTEM, 1, 2, 3],
    SYSTEM + [n % 240 for n in range(90)],
    [*SYSTEM, 1, 2, 3],
    SYSTEM[:99] + [7] * 20,
    [9, 8, 7],
    SYSTEM + [n % 240 for n in range(90)] + [5] * 21,
]


@pytest.fixture(scope="module", params=[SLIDING, WINDOWS], ids=["one layer slides", "all do"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("windows"), **request.param)


async def answers(
    folder: Path, prompts: list[list[int]], **changes: Any
) -> tuple[list[tuple[list[int], list[float]]], list[int], int]:
    """Every answer's token ids and logprobs, how many tokens of each prompt were found, and how
    many window pages there were."""
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=0)
    together = changes.pop("together", False)
    async with AsyncEngine.from_pretrained(str(folder), **(SETTINGS | changes)) as served:

        async def answer(prompt: list[int]) -> tuple[tuple[list[int], list[float]], int]:
            ids: list[int] = []
            logprobs: list[float] = []
            cached = 0
            async for delta in served.generate(prompt, params):
                ids += delta.token_ids
                logprobs += [found.logprob for found in delta.logprobs or ()]
                cached = delta.usage.cached_tokens if delta.usage else cached
            return (ids, logprobs), cached

        if together:
            found = await asyncio.gather(*map(answer, prompts))
        else:
            found = [await answer(prompt) for prompt in prompts]
        windows = served.parts.scheduler.pool.windows
    count = windows.total if windows is not None else 0
    return [said for said, _ in found], [cached for _, cached in found], count


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple[list[int], list[float]]]:
    found, _, windows = asyncio.run(
        answers(folder, PROMPTS, cache__prefix_caching=False, cache__windows="whole")
    )
    assert windows == 0
    return found


@pytest.mark.parametrize("together", [True, False])
async def test_windows_do_not_change_what_is_said(
    folder: Path, whole: list[tuple[list[int], list[float]]], *, together: bool
) -> None:
    found, cached, windows = await answers(folder, PROMPTS, together=together)
    assert found == whole
    assert 0 < windows < 2048 // 16 // 2
    assert sum(cached) > 500


@pytest.mark.parametrize("changes", [
    {"execution__backend": "torch"},
    {"execution__tensor_parallel": 2},
    {"cache__cold_tokens": 4096, "cache__tokens": 1024},
    {"cache__dtype": "int8"},
    {"cache__dtype": "int8", "cache__cold_tokens": 4096, "cache__tokens": 1024},
    {"scheduler__speculative_tokens": 4},
])  # fmt: skip
async def test_elsewhere_it_is_the_same(folder: Path, changes: dict[str, Any]) -> None:
    found, _, windows = await answers(folder, PROMPTS, **changes)
    expected, _, none = await answers(folder, PROMPTS, cache__windows="whole", **changes)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    # In torch numbers depend on who is beside them.
    exact = changes.get("execution__backend") != "torch"
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert ours == theirs or (not exact and ours == pytest.approx(theirs, abs=1e-4))
    assert windows > none == 0


async def test_a_conversation_goes_on_from_its_last_window(
    folder: Path, whole: list[tuple[list[int], list[float]]]
) -> None:
    later = PROMPTS[1] + whole[1][0] + [4, 4, 4]
    _, cached, _ = await answers(folder, [PROMPTS[1], [3] * 300, later])
    assert cached[2] >= len(later) - 3 - 16
