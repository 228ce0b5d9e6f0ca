"""The engine on a model whose layers keep states: what is shared does not change what is said."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine import AsyncEngine, SamplingParams
from engine.errors import ConfigError
from tests.tiny import CONV, DELTA, write_llama

SETTINGS: dict[str, Any] = {
    "cache__page_size": 16,
    "cache__tokens": 2048,
    "scheduler__max_batch_tokens": 96,
    "scheduler__max_running": 8,
    "model__max_context": 256,
    "model__dtype": "float32",
}
SYSTEM = [n % 250 for n in range(60, 130)]
# Requests that begin alike, go on from others, or have nothing in common with any.
PROMPTS = [
    [*SYSTEM, 1, 2, 3],
    SYSTEM + [n % 240 for n in range(40)],
    [*SYSTEM, 1, 2, 3],
    SYSTEM[:33] + [7] * 20,
    [9, 8, 7],
    SYSTEM + [n % 240 for n in range(40)] + [5] * 21,
]


@pytest.fixture(scope="module", params=[DELTA, CONV], ids=["delta nets", "convolutions"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("states"), **request.param)


async def answers(
    folder: Path, prompts: list[list[int]], *, together: bool, **changes: Any
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every answer, and how many tokens of each prompt were found."""
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    async with AsyncEngine.from_pretrained(str(folder), **(SETTINGS | changes)) as served:

        async def answer(prompt: list[int]) -> tuple[list[int], int]:
            ids: list[int] = []
            cached = 0
            async for delta in served.generate(prompt, params):
                ids += delta.token_ids
                cached = delta.usage.cached_tokens if delta.usage else cached
            return ids, cached

        if together:
            found = await asyncio.gather(*map(answer, prompts))
        else:
            found = [await answer(prompt) for prompt in prompts]
    return [ids for ids, _ in found], [cached for _, cached in found]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    nothing_shared = answers(folder, PROMPTS, together=False, cache__prefix_caching=False)
    found, cached = asyncio.run(nothing_shared)
    assert not any(cached)
    return found


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("snapshots", ["auto", 1, 0])
async def test_sharing_does_not_change_the_text(
    folder: Path, alone: list[list[int]], snapshots: Any, *, together: bool
) -> None:
    found, cached = await answers(folder, PROMPTS, together=together, cache__snapshots=snapshots)
    assert found == alone
    if snapshots == "auto":
        assert cached[2] == 64  # up to the last page of the same prompt
    assert snapshots or not any(cached)


async def test_whoever_goes_on_from_an_answer_has_it_computed(
    folder: Path, alone: list[list[int]]
) -> None:
    later = PROMPTS[0] + alone[0] + [4, 4, 4]
    expected, _ = await answers(folder, [later], together=False, cache__prefix_caching=False)
    found, cached = await answers(folder, [PROMPTS[0], later], together=False)
    assert found == [alone[0], *expected]
    assert cached[1] >= 64  # the pages that the answer filled are kept now and then


async def test_a_beginning_that_many_share_is_kept_where_they_part(
    folder: Path,
) -> None:
    prompts = [SYSTEM + [n] * 30 for n in range(4)]
    _, cached = await answers(folder, prompts, together=False)
    assert cached == [0, 0, 64, 64]  # the second finds out where that is


async def test_preemption_goes_on_from_what_was_kept(folder: Path, alone: list[list[int]]) -> None:
    found, _ = await answers(folder, PROMPTS, together=True, cache__tokens=256)
    assert found == alone


@pytest.mark.parametrize("changes", [
    {"execution__backend": "torch"},
    {"execution__tensor_parallel": 2},
    {"cache__cold_tokens": 2048, "cache__tokens": 256},
])  # fmt: skip
async def test_elsewhere_it_is_the_same(
    folder: Path, alone: list[list[int]], changes: dict[str, Any]
) -> None:
    found, _ = await answers(folder, PROMPTS, together=True, **changes)
    assert found == alone


async def test_guesses_are_refused_since_a_state_cannot_take_them_back(folder: Path) -> None:
    settings = SETTINGS | {"scheduler__speculative_tokens": 4}
    with pytest.raises(ConfigError, match="speculative_tokens is 4"):
        async with AsyncEngine.from_pretrained(str(folder), **settings):
            pass
