"""Speculative decoding: what guessing from the text gives, and what it costs where it is wrong.

python -m perf.speculation
"""

from __future__ import annotations

import asyncio
import statistics
import time

from cyclopts import App

from engine import AsyncEngine, SamplingParams

app = App(help=__doc__)
CODE = """def area(width, height):
    return width * height


def volume(width, height, depth):
    return width * height * depth


def perimeter(width, height):
    return 2 * (width + height)
"""
PROMPTS = {
    "copies": 3 * f"{CODE}\n\n",
    "writes": "Once upon a time a fox met a lighthouse keeper, who",
}


async def answer(
    engine: AsyncEngine, prompt: str, streams: int, tokens: int
) -> tuple[float, list[str]]:
    """Tokens a second of several answers, and their texts."""
    texts, count = [""] * streams, 0

    async def one(number: int) -> None:
        nonlocal count
        params = SamplingParams(max_tokens=tokens, temperature=0.3, seed=number, ignore_eos=True)
        async for delta in engine.generate(prompt, params):
            texts[number] += delta.text
            count += len(delta.token_ids)

    begin = time.perf_counter()
    await asyncio.gather(*map(one, range(streams)))
    return count / (time.perf_counter() - begin), texts


async def measure(model: str, tokens: int, rounds: int) -> None:
    async with AsyncEngine.from_pretrained(model) as engine:
        speculator = engine.parts.scheduler.speculator
        most = speculator.most
        for streams in (1, 4):
            for name, prompt in PROMPTS.items():
                await answer(engine, prompt, streams, tokens)
                ratios, rates = [], []
                drafted, accepted = speculator.drafted, speculator.accepted
                for _ in range(rounds):
                    speculator.most = 0
                    plain, texts = await answer(engine, prompt, streams, tokens)
                    speculator.most = most
                    guessing, same = await answer(engine, prompt, streams, tokens)
                    assert texts == same, "a guess changed an answer"
                    ratios.append(guessing / plain)
                    rates.append((plain, guessing))
                drafted = speculator.drafted - drafted
                share = (speculator.accepted - accepted) / max(1, drafted)
                plain, guessing = (statistics.median(r) for r in zip(*rates, strict=True))
                print(
                    f"{streams} streams, {name}: {plain:.0f} tokens/s, guessing {guessing:.0f}, "
                    f"{statistics.median(ratios):.2f} of it; {drafted} guessed, {share:.0%} right"
                )


@app.default
def main(*, model: str = "smollm2-135m", tokens: int = 256, rounds: int = 5) -> None:
    """Alternate answers with and without guesses, and print medians and their ratio."""
    asyncio.run(measure(model, tokens, rounds))


if __name__ == "__main__":
    app()
