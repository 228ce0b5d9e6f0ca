"""What a weight and cache format costs in quality: perplexity and top-1 agreement with float32.

    python -m perf.quality --text FILE --model smollm2-135m

Every format scores the same windows of the text, through the engine that serves it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import anyio
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from engine import AsyncEngine, ConfigError, SamplingParams

# Name -> settings; the first is what the others are compared with.
FORMATS: dict[str, dict[str, Any]] = {
    "float32 (torch)": {
        "execution.backend": "torch",
        "model.dtype": "float32",
        "cache.dtype": "float32",
    },
    "float32": {"model.dtype": "float32"},
    "float32, int8 cache": {"model.dtype": "float32", "cache.dtype": "int8"},
    "float32, int4 cache": {"model.dtype": "float32", "cache.dtype": "int4"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "int8": {"model.dtype": "int8"},
    "int4": {"model.dtype": "int4"},
    "as packed": {},
    "as packed, int8 cache": {"cache.dtype": "int8"},
    "as packed, int4 cache": {"cache.dtype": "int4"},
}


async def score(
    model: str, text: str, windows: int, length: int, settings: dict[str, Any]
) -> tuple[list[float], list[int]]:
    """Logprob of each token of the windows after the first, and the likeliest token there."""
    logprobs: list[float] = []
    best: list[int] = []
    chosen = {key.replace(".", "__"): value for key, value in settings.items()}
    async with AsyncEngine.from_pretrained(model, cache__tokens=4 * length, **chosen) as engine:
        ids = await engine.encode(text, add_special_tokens=False)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        for start in range(0, min(len(ids) - 1, windows * length), length):
            async for delta in engine.generate(ids[start : start + length], params):
                for item in delta.prompt_logprobs or ():
                    if item is not None:
                        logprobs.append(item.logprob)
                        best.append(item.top[0][0])
    return logprobs, best


app = App(name="perf.quality", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    text: Path,
    model: str = "smollm2-135m",
    windows: int = 16,
    length: int = 512,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Score the text in every format and print one table."""
    content = text.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    reference: list[int] = []
    for name, settings in FORMATS.items():
        try:
            logprobs, best = anyio.run(score, model, content, windows, length, settings)
        except ConfigError as error:
            print(f"{name}: not for this model ({error})")
            continue
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        reference = reference or best
        agreement = sum(a == b for a, b in zip(best, reference, strict=True)) / len(best)
        first = rows[0]["perplexity"] if rows else perplexity
        rows.append(
            {
                "format": name,
                "tokens": len(logprobs),
                "perplexity": round(perplexity, 4),
                "against float32": f"{100 * (perplexity / first - 1):+.2f}%",
                "same top token": f"{100 * agreement:.2f}%",
            }
        )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    app()
