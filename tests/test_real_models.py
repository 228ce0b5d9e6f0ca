"""Real weights: SmolLM2-135M (always) and Gemma 3 270M (where its terms have been accepted).

Each model runs with fp32 weights and KV cache, on the native kernels where they are built and on
the torch path, and is compared with `transformers` on the same dequantized weights. Greedy text is
equal to theirs if at every position our token is their most likely one, which one forward pass over
our whole text shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import transformers

from engine import AsyncEngine, SamplingParams
from engine.execution.tokenizer import open_tokenizer
from engine.weights.checkpoint import open_checkpoint
from tests.guesses import guess_all
from tests.kernels.native import needs_native
from tests.real import gemma3_path, smollm2_path, without_vocabulary

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first humans",
    "To make bread you need flour,",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to",
    "The opposite of hot is",
    "List of European countries:\n1.",
    "import numpy as np\n\n",
    "She opened the door and saw",
    "The Pythagorean theorem states that",
    "Q: What is the largest planet?\nA:",
    "El perro y el gato",
    "Shakespeare wrote",
    "SELECT name FROM",
    "The quick brown fox",
    "Once the experiment was finished, the scientists",
]
LENGTH = 64
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
FP32: dict[str, Any] = {"model__dtype": "float32", "cache__dtype": "float32"}

pytestmark = [pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_path()


@pytest.fixture(scope="module")
def gemma3() -> Path:
    return gemma3_path()


CHUNKED = {"scheduler__max_batch_tokens": 40, "scheduler__max_running": 8}


def hugging_face(path: Path, folder: Path) -> Any:
    copy = without_vocabulary(path, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=copy.name, dtype=torch.float32
    ).eval()


def run_engine(
    path: Path, prompts: list[str], *, together: bool, **settings: Any
) -> list[list[int]]:
    """Greedy token ids of each prompt, alone one after the other or all at once."""
    results: dict[int, list[int]] = {}

    async def one(engine: AsyncEngine, number: int) -> None:
        ids: list[int] = []
        async for delta in engine.generate(prompts[number], GREEDY):
            ids += delta.token_ids
        results[number] = ids

    async def main() -> None:
        chosen = {"cache__tokens": 16384, **FP32, **settings}
        async with AsyncEngine.from_pretrained(str(path), **chosen) as engine:
            if settings.get("cache__tokens"):
                for _ in range(20):
                    engine.parts.scheduler.lengths.record(1)  # so that too many are let in
            async with anyio.create_task_group() as group:
                for number in range(len(prompts)):
                    if together:
                        group.start_soon(one, engine, number)
                    else:
                        await one(engine, number)
            checks.append((engine.parts.scheduler.preemptions, engine.parts.scheduler.pool.used))

    checks: list[tuple[int, int]] = []
    anyio.run(main)
    assert checks[0][1] == 0, "pages were not given back"
    if settings.get("cache__tokens"):
        assert checks[0][0] > 0, "the small pool was meant to force preemption"
    return [results[number] for number in range(len(prompts))]


def assert_greedy(model: Any, prompt_ids: list[int], ours: list[int]) -> None:
    """Every one of our tokens is the model's argmax after what came before it."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ours])).logits[0]
    theirs = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    assert theirs == ours


async def prompt_logits(
    path: Path, prompt: str, backend: str = "auto"
) -> tuple[list[int], torch.Tensor]:
    """The engine's fp32 logits after a prompt, taken from the program that serves it."""
    settings = {"cache__tokens": 4096, "execution__backend": backend, **FP32}
    async with AsyncEngine.from_pretrained(str(path), **settings) as engine:
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0)):
            pass
        program = engine.parts.stepper._executor._programs[0]  # type: ignore[attr-defined]
        return await engine.encode(prompt), program.logits()[0].clone()


@pytest.fixture(scope="module")
def reference(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hugging_face(smollm2, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def gemma_reference(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hugging_face(gemma3, tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> list[list[int]]:
    return run_engine(smollm2, PROMPTS, together=False)


@pytest.mark.parametrize("backend", ["auto", "torch"])
async def test_smollm2_logits_agree_with_transformers(
    smollm2: Path, reference: Any, backend: str
) -> None:
    ids, logits = await prompt_logits(smollm2, " ".join(PROMPTS[:12]), backend)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, -1]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-3


def test_smollm2_greedy_text_equals_transformers(
    smollm2: Path, reference: Any, alone: list[list[int]]
) -> None:
    tokenizer = open_tokenizer(open_checkpoint(smollm2))
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        assert len(ids) == LENGTH
        assert_greedy(reference, tokenizer.encode(prompt), ids)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CHUNKED | {"cache__page_size": 32},
        {"scheduler__look_ahead": False},
        {"cache__prefix_caching": False},
        {"cache__tokens": 640},
        {"execution__backend": "torch"},
    ],
    ids=["together", "chunked", "in turn", "unshared", "preempted", "on torch"],
)
def test_company_does_not_change_the_text(
    smollm2: Path, alone: list[list[int]], settings: dict[str, Any]
) -> None:
    assert run_engine(smollm2, PROMPTS, together=True, **settings) == alone


@needs_native
@pytest.mark.parametrize("settings", [{}, {"execution__tensor_parallel": 2}], ids=["one", "ranks"])
def test_guesses_do_not_change_the_text(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Right and wrong ones, as many as fit, drawn and greedy."""

    guess_all(monkeypatch)
    prompt = "The cat sat on the mat. The dog lay on the rug. " * 3

    async def texts(most: int) -> list[str]:
        found = []
        chosen = {"cache__tokens": 4096, "scheduler__speculative_tokens": most, **settings}
        async with AsyncEngine.from_pretrained(str(smollm2), **chosen) as engine:
            for temperature in (0.0, 1.0):
                params = SamplingParams(max_tokens=60, temperature=temperature, seed=3)
                found.append("".join([d.text async for d in engine.generate(prompt, params)]))
            speculator = engine.parts.scheduler.speculator
            assert (speculator.drafted > speculator.accepted > 0) == (most > 0)
        return found

    assert anyio.run(texts, 6) == anyio.run(texts, 0)


@needs_native
def test_on_the_native_kernels_company_does_not_change_the_text(
    smollm2: Path, reference: Any
) -> None:
    """The default configuration: the shipped 4-bit weights, int8 activations, bfloat16 KV cache.

    The text is close to fp32's on the same weights: nearly every token is fp32's own choice too.
    How many are is 95.8 to 96.7% of long texts (perf/README.md, "same top token"), and depends on
    the instruction set, whose sums have an order of their own; it never depends on company.
    """
    native: dict[str, Any] = {"model__dtype": "auto", "cache__dtype": "auto"}
    alone = run_engine(smollm2, PROMPTS, together=False, **native)
    for settings in ({}, CHUNKED, {"cache__tokens": 640}):
        assert run_engine(smollm2, PROMPTS, together=True, **native, **settings) == alone
    assert run_engine(smollm2, PROMPTS, together=True, **native, execution__threads=1) == alone
    tokenizer = open_tokenizer(open_checkpoint(smollm2))
    same = total = 0
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        prompt_ids = tokenizer.encode(prompt)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt_ids + ids])).logits[0]
        theirs = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(ids, theirs, strict=True))
        total += len(ids)
    assert same / total > 0.95, f"{same} of {total}"


async def test_a_prefix_hit_does_not_change_the_text(smollm2: Path, alone: list[list[int]]) -> None:
    async with AsyncEngine.from_pretrained(str(smollm2), cache__tokens=4096, **FP32) as engine:
        prompt = await engine.encode(PROMPTS[1]) + alone[1][:30]
        for _ in range(2):
            ids: list[int] = []
            async for delta in engine.generate(prompt, GREEDY):
                ids += delta.token_ids
                usage = delta.usage
            assert ids[: LENGTH - 30] == alone[1][30:]
        assert usage is not None
        assert usage.cached_tokens == len(prompt) - 1


@needs_native
@pytest.mark.parametrize(
    ("dtype", "cold", "apart"),
    [
        ("bfloat16", "auto", 0.0),
        ("int8", "auto", 0.0),
        ("int4", "auto", 0.0),
        ("bfloat16", "int8", 0.3),
        ("bfloat16", "int4", 0.6),
    ],
)
async def test_what_comes_back_from_the_cold_tier_is_what_went_there(
    smollm2: Path, tmp_path: Path, dtype: str, cold: str, apart: float
) -> None:
    """Byte for byte, or rounded as the operator asked: the likeliest tokens behind the prompt are
    those that were and their logprobs close, which another prompt's are not. (Greedy text goes its
    own way once two tokens are as good as equal.)"""
    settings: dict[str, Any] = {
        "cache__tokens": 480,
        "cache__dtype": dtype,
        "cache__cold_tokens": 8192,
        "cache__cold_folder": str(tmp_path),
        "cache__cold_dtype": cold,
        "cache__eviction": "adaptive",
    }
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=5)
    rounds: list[list[int]] = []
    likeliest: list[dict[int, float]] = []  # behind each prompt, of both rounds
    async with AsyncEngine.from_pretrained(str(smollm2), **settings) as engine:
        for _ in range(2):
            rounds.append([])
            for number in range(6):
                prompt = " ".join(PROMPTS[number:] + PROMPTS[:number])
                first = len(rounds[-1])
                async for delta in engine.generate(prompt, params):
                    if len(rounds[-1]) == first and delta.logprobs:
                        likeliest.append(dict(delta.logprobs[0].top))
                    rounds[-1] += delta.token_ids
        assert engine.parts.scheduler.cold.hits > 10
        fingerprint = engine.parts.fingerprint
    for before, after in zip(likeliest[:6], likeliest[6:], strict=True):
        both = before.keys() & after.keys()
        assert len(both) >= 4
        assert max(abs(before[token] - after[token]) for token in both) <= apart
    assert (rounds[0] == rounds[1]) == (cold == "auto")
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240  (the file has no name)
    del settings["cache__cold_tokens"], settings["cache__cold_dtype"]
    async with AsyncEngine.from_pretrained(str(smollm2), **settings) as engine:
        assert (engine.parts.fingerprint == fingerprint) == (cold == "auto")


@needs_native
def test_the_budget_is_what_a_full_cache_takes(smollm2: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.execution.filled", str(smollm2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["held"] == pytest.approx(report["budget"], rel=0.05)


async def test_smollm2_logprobs_agree_with_llama_cpp(smollm2: Path) -> None:
    """Values that llama.cpp printed; it quantizes activations, so they are close, not equal."""
    async with AsyncEngine.from_pretrained(str(smollm2), cache__tokens=4096, **FP32) as engine:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=3)
        deltas = [d async for d in engine.generate("The capital of France is", params)]
        (entry,) = deltas[0].logprobs
        names = [engine.parts.tokenizer.token_bytes(t).decode() for t, _ in entry.top]
    assert names == [" Paris", " the", " London"]
    values = [value for _, value in entry.top]
    assert values == pytest.approx([-0.2589, -2.7646, -4.2949], abs=0.1)


async def test_smollm2_answers_in_a_conversation(smollm2: Path) -> None:
    """The default configuration, as a newcomer runs it."""
    async with AsyncEngine.from_pretrained(str(smollm2), cache__tokens=4096) as engine:
        messages = [{"role": "user", "content": "Tell me the capital of France."}]
        params = SamplingParams(max_tokens=40, temperature=0)
        deltas = [d async for d in engine.chat(messages, params)]
    assert "Paris" in "".join(d.text for d in deltas)
    assert deltas[-1].finish_reason == "stop"


async def test_gemma3_logits_agree_with_transformers(gemma3: Path, gemma_reference: Any) -> None:
    prompt = " ".join(PROMPTS)
    ids, logits = await prompt_logits(gemma3, prompt)
    with torch.no_grad():
        expected = gemma_reference(torch.tensor([ids])).logits[0, -1]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-3


def test_gemma3_greedy_text_equals_transformers(gemma3: Path, gemma_reference: Any) -> None:
    tokenizer = open_tokenizer(open_checkpoint(gemma3))
    texts = run_engine(gemma3, PROMPTS, together=True)
    for prompt, ids in zip(PROMPTS, texts, strict=True):
        assert_greedy(gemma_reference, tokenizer.encode(prompt), ids)
