"""The runner on a tiny real model: what a plan becomes, and what sampling options do to text."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from engine import AsyncEngine, Delta, SamplingParams
from tests.tiny import write_llama

SETTINGS: dict[str, Any] = {"model__dtype": "float32", "cache__tokens": 2048}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("runner") / "tiny"))


async def run(engine: AsyncEngine, prompt: str = "Hello", **params: Any) -> Delta:
    merged = Delta()
    params = {"max_tokens": 12, "temperature": 0, "ignore_eos": True} | params
    async for delta in engine.generate(prompt, SamplingParams(**params)):
        merged.merge(delta)
    return merged


async def test_sampling_options_act_on_real_logits(folder: str) -> None:
    async with AsyncEngine.from_pretrained(folder, **SETTINGS) as engine:
        greedy = await run(engine)
        first = greedy.token_ids[0]
        # A bias forbids, a penalty moves on, min_tokens holds the end back.
        assert (await run(engine, logit_bias={first: -100.0})).token_ids[0] != first
        forced = await run(engine, logit_bias={65: 100.0})
        assert forced.text == "A" * 12
        varied = await run(engine, logit_bias={65: 60.0}, frequency_penalty=2.0, max_tokens=60)
        assert len(set(varied.token_ids)) > 1
        present = await run(engine, logit_bias={65: 60.0, 66: 59.0}, presence_penalty=2.0)
        assert set(present.text) == {"A", "B"}
        repeated = await run(
            engine, "A" * 8, logit_bias={65: 60.0, 66: 59.9}, repetition_penalty=9.0
        )
        assert repeated.text[0] == "B"
        ends = await run(engine, logit_bias={256: 100.0}, ignore_eos=False)
        assert (ends.finish_reason, len(ends.token_ids)) == ("stop", 1)
        late = await run(engine, logit_bias={256: 100.0}, ignore_eos=False, min_tokens=5)
        assert len(late.token_ids) == 6
        assert 256 not in late.token_ids[:5]


async def test_a_tiny_temperature_takes_the_likeliest_token(folder: str) -> None:
    async with AsyncEngine.from_pretrained(folder, **SETTINGS) as engine:
        greedy = await run(engine)
        for temperature in (1e-38, 1e-6):
            assert (await run(engine, temperature=temperature)).text == greedy.text


async def test_a_seed_fixes_the_text_and_choices_differ(folder: str) -> None:
    async with AsyncEngine.from_pretrained(folder, **SETTINGS) as engine:
        params = SamplingParams(max_tokens=12, seed=3, n=3, ignore_eos=True)
        runs = []
        for _ in range(2):
            texts: dict[int, list[int]] = {0: [], 1: [], 2: []}
            async for delta in engine.generate("Hello", params):
                texts[delta.index] += delta.token_ids
            runs.append(texts)
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0].values()}) == 3


async def test_prompt_logprobs_are_the_same_in_chunks_and_agree_with_generation(
    folder: str,
) -> None:
    results = []
    for budget in (512, 18):
        settings = SETTINGS | {
            "scheduler__max_batch_tokens": budget,
            "scheduler__max_running": 2,
        }
        async with AsyncEngine.from_pretrained(folder, **settings) as engine:
            generated = await run(engine, logprobs=2)
            text = [*b"Hello", *generated.token_ids]
            merged = Delta()
            params = SamplingParams(max_tokens=1, prompt_logprobs=2)
            async for delta in engine.generate(text, params):
                merged.merge(delta)
        scores = merged.prompt_logprobs
        assert scores is not None
        assert len(scores) == len(text)
        assert [s.token_id for s in scores[1:] if s is not None] == text[1:]
        for scored, drawn in zip(scores[5:], generated.logprobs, strict=True):
            assert scored is not None
            assert scored.logprob == pytest.approx(drawn.logprob, abs=1e-4)
            assert [t for t, _ in scored.top] == [t for t, _ in drawn.top]
        results.append([s.logprob for s in scores if s is not None])
    assert results[0] == pytest.approx(results[1], abs=1e-4)


async def test_penalties_survive_preemption(folder: str) -> None:
    """A sequence that is preempted and recomputed keeps its whole history."""
    params = {"frequency_penalty": 1.5, "repetition_penalty": 1.3, "max_tokens": 60}
    prompts = [f"prompt {i}" for i in range(4)]
    async with AsyncEngine.from_pretrained(folder, **SETTINGS) as engine:
        alone = [(await run(engine, p, **params)).token_ids for p in prompts]
    together: dict[str, list[int]] = {}
    small = SETTINGS | {"cache__tokens": 160}
    async with AsyncEngine.from_pretrained(folder, **small) as engine:
        for _ in range(20):
            engine.parts.scheduler.lengths.record(1)  # what is expected is too little

        async def one(prompt: str) -> None:
            together[prompt] = (await run(engine, prompt, **params)).token_ids

        async with anyio.create_task_group() as group:
            for prompt in prompts:
                group.start_soon(one, prompt)
        assert engine.parts.scheduler.preemptions > 0
    assert [together[p] for p in prompts] == alone


async def test_the_context_is_bounded_by_model_setting_and_pool(folder: str) -> None:
    for settings, context in (
        ({}, 512),
        ({"model__max_context": 100}, 100),
        ({"cache__tokens": 64}, 64),
    ):
        async with AsyncEngine.from_pretrained(folder, **(SETTINGS | settings)) as engine:
            assert engine.parts.limits.context == context


async def test_prefix_caching_can_be_switched_off(folder: str) -> None:
    for on in (True, False):
        settings = SETTINGS | {"cache__prefix_caching": on}
        async with AsyncEngine.from_pretrained(folder, **settings) as engine:
            prompt = "The same long prompt, twice."
            texts = [await run(engine, prompt) for _ in range(2)]
            assert texts[0].text == texts[1].text
            usage = texts[1].usage
            assert usage is not None
            assert (usage.cached_tokens > 0) is on
