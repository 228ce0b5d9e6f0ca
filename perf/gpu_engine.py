"""Whole requests through the real engine, on a model with random weights, beside `transformers`.

    PYTHONPATH=. python -m perf.gpu_engine [--model Qwen3-0.6B] [--requests 256] [--peer]

The load of nano-vllm's benchmark: 256 requests at once, prompts and answers of 100 to 1,024 tokens
each, drawn evenly, every answer to its full length. Then one request alone. A folder with a random
model is written first, so that loading is real, too. `--http` asks the server one by one, too;
`--guesses` has one request alone answered with and without guesses, in turns; `--peer` gives all
requests to `transformers`' continuous batching. `--smoke` tries it all at toy sizes on whatever
there is.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine import AsyncEngine, SamplingParams
from kernels.gpu.catalogue import MODELS, Dimensions
from perf.company import server
from perf.gpu import TOY, RandomCheckpoint
from perf.load import Settings, run, served_model, summarize

# Tokens that are guessed at once.
GUESSES = 8
Requests = list[tuple[list[int], int]]


def write_folder(model: Dimensions, folder: Path, context: int, device: torch.device) -> None:
    """A model in Hugging Face layout with random weights and a tokenizer of bytes."""
    checkpoint = RandomCheckpoint(model, device, context)
    name = "Qwen3ForCausalLM" if model.norms else "LlamaForCausalLM"
    more = {"architectures": [name], "eos_token_id": 0, "bos_token_id": 0, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(checkpoint.config | more))
    tensors = {
        name: checkpoint.tensor(name).dense().to(torch.bfloat16).cpu()
        for name in sorted(checkpoint.names())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Every id is text, so that each token is one event; prompts are bytes.
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters += [f"w{n}" for n in range(len(letters), model.vocab - 1)]
    tokenizer = Tokenizer(models.BPE({text: n for n, text in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def requests_of(count: int, least: int, most: int, vocab: int) -> Requests:
    """Random prompts and lengths of answers; the same every time."""
    rng = random.Random(0)
    return [
        (
            [rng.randrange(1, min(vocab, 256)) for _ in range(rng.randint(least, most))],
            rng.randint(least, most),
        )
        for _ in range(count)
    ]


async def through_engine(folder: Path, requests: Requests, settings: dict[str, Any]) -> Any:
    """Output tokens a second of all requests together, and of the first alone."""
    start = time.perf_counter()
    async with AsyncEngine.from_pretrained(str(folder), **settings) as engine:
        loaded = time.perf_counter() - start

        async def run(prompt: list[int], count: int) -> int:
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            seen = 0
            async for delta in engine.generate(prompt, params):
                seen += len(delta.token_ids)
            assert seen == count, (seen, count)
            return seen

        await run(requests[0][0], 2)
        start, busy = time.perf_counter(), time.process_time()
        async with anyio.create_task_group() as group:
            for prompt, count in requests:
                group.start_soon(run, prompt, count)
        together, busy = time.perf_counter() - start, time.process_time() - busy
        start = time.perf_counter()
        alone = await run(*requests[0])
        return {
            "device": engine.parts.device,
            "load_seconds": loaded,
            "seconds": together,
            "cpu_seconds": busy,
            "tokens_per_second": sum(count for _, count in requests) / together,
            "alone_tokens_per_second": alone / (time.perf_counter() - start),
        }


async def with_guesses(
    folder: Path, prompt: list[int], count: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Output tokens a second of one request alone, with and without guesses: medians of three, in
    turns. A model with random weights soon repeats itself, as some texts do."""
    rates: dict[int, list[float]] = {0: [], GUESSES: []}
    texts = set()
    chosen = settings | {"scheduler__speculative_tokens": GUESSES}
    async with AsyncEngine.from_pretrained(str(folder), **chosen) as engine:
        speculator = engine.parts.scheduler.speculator
        for turn in range(8):
            speculator.most = GUESSES * (turn % 2)
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            start = time.perf_counter()
            ids = [i async for d in engine.generate(prompt, params) for i in d.token_ids]
            if turn > 1:  # the first of each kind finds out what steps take
                rates[speculator.most].append(count / (time.perf_counter() - start))
            texts.add(tuple(ids))
        return {
            "plain_tokens_per_second": statistics.median(rates[0]),
            "guessing_tokens_per_second": statistics.median(rates[GUESSES]),
            "drafted": speculator.drafted,
            "accepted": speculator.accepted,
            "texts": len(texts),
        }


def through_http(
    folder: Path, settings: dict[str, Any], prompt: int, output: int
) -> dict[str, Any]:
    """Output tokens a second of one client, whose requests follow each other, as the client of a
    server in another process sees them."""
    flags = [
        f"{key.replace('__', '.')}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]
    arguments = ["--model", str(folder)]
    for flag in [*flags, "batches.enabled=false"]:
        arguments += ["--set", flag]
    with server(*arguments) as url:
        load = Settings(
            url=url,
            model=anyio.run(served_model, url, None),
            prompt_tokens=(prompt, prompt),
            output_tokens=(output, output),
            chat=False,
            api_key=None,
            ignore_eos=True,
        )
        run_load = partial(run, load, concurrency=1, requests=5, rate=None, seed=0)
        outcomes, seconds = anyio.run(run_load)
    summary = summarize(outcomes, seconds, 1.0, 0.1)
    assert not summary["errors"], summary["first_error"]
    return {
        "tokens_per_second": summary["output_tokens_per_second"],
        "itl_p50_ms": summary["itl_ms"]["p50"],
        "itl_p99_ms": summary["itl_ms"]["p99"],
        "ttft_p50_ms": summary["ttft_ms"]["p50"],
    }


def through_transformers(folder: Path, requests: Requests, device: torch.device) -> dict[str, Any]:
    """The same with `transformers`' continuous batching; it wants one length for all answers, so
    every answer has the mean length."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(device)
    mean = sum(count for _, count in requests) // len(requests)
    make: Any = transformers.GenerationConfig
    generation = make(max_new_tokens=mean, min_new_tokens=mean, do_sample=False, eos_token_id=-1)
    prompts = [prompt for prompt, _ in requests]
    # A first call captures its graphs, which ours did while loading.
    few = make(max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=-1)
    model.generate_batch(prompts, few, persistent_manager=True)
    start = time.perf_counter()
    outputs = model.generate_batch(prompts, generation, persistent_manager=True)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


def measure(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="Qwen3-0.6B", choices=[m.name for m in MODELS])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--guesses", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = next(m for m in MODELS if m.name == options.model)
    least, most, context = 100, 1024, 2048
    settings: dict[str, Any] = {
        "model__dtype": options.dtype,
        "scheduler__max_running": 256,
        "scheduler__max_batch_tokens": 2048,
        "cache__memory_fraction": 0.8,
        "cache__prefix_caching": False,
    }
    if options.smoke:
        model, least, most, context = TOY, 3, 9, 2048
        settings |= {"scheduler__max_running": 4, "scheduler__max_batch_tokens": 32}
        settings |= {"cache__tokens": 4096}
    prompt, output = (8, 8) if options.smoke else (128, most)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(model, folder, context, device)
        requests = requests_of(options.requests, least, most, model.vocab)
        result: dict[str, Any] = {"model": model.name, "requests": len(requests)}

        def note(part: str, found: dict[str, Any]) -> None:
            result[part] = found
            figures = (
                value
                if isinstance(value, str)
                else f"{key} {value:,.{isinstance(value, float):d}f}"
                for key, value in found.items()
            )
            print(f"{model.name} {part}: {', '.join(figures)}", flush=True)

        note("engine", anyio.run(through_engine, folder, requests, settings))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.guesses:
            note("guesses", anyio.run(with_guesses, folder, requests[0][0], output, settings))
            gc.collect()
        if options.http:
            note("http", through_http(folder, settings, prompt, output))
        if options.peer:
            note("transformers", through_transformers(folder, requests, device))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    measure()
