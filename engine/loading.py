"""From a configuration to everything that an engine needs to run: tokenizer, scheduler, stepper."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.config import Config
from engine.errors import ConfigError
from engine.execution.memory import cache_pages
from engine.execution.runner import Runner, StagingShape
from engine.execution.stepper import Stepper, ThreadStepper
from engine.models import Model, load_model
from engine.scheduling.pages import PagePool
from engine.scheduling.policy import Limits
from engine.scheduling.scheduler import Chunk, Plan, Scheduler, SchedulerLimits
from engine.scheduling.sequence import Sequence
from engine.text.gguf_tokenizer import tokenizer_from_gguf
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.types import Clock, MonotonicClock, Request, SamplingParams
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.gguf import GGUFCheckpoint
from engine.weights.sources import KNOWN_MODELS, Progress, cache_folder, resolve
from kernels.backend import Backend, CacheDType, CacheLayout, select_backend
from kernels.ops import Recorder


@dataclass
class Parts:
    """What an `AsyncEngine` runs on."""

    model_name: str
    tokenizer: Tokenizer
    vocab_size: int
    scheduler: Scheduler
    stepper: Stepper
    limits: Limits
    fingerprint: bytes
    clock: Clock = field(default_factory=MonotonicClock)
    device: str = ""
    timeline: list[tuple[str, float]] = field(default_factory=list)
    """Start-up stages and their seconds."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.scheduler.pool.total * self.scheduler.pool.page_size


def load(
    config: Config,
    *,
    progress: Progress = lambda *_: None,
    accept_terms: Callable[[str], bool] = lambda _: False,
) -> Parts:
    """Find, read and warm up the configured model. Raises ConfigError in one sentence."""
    try:
        return _load(config, progress, accept_terms)
    except (OSError, MemoryError) as error:
        raise ConfigError(f"cannot load {config.model.name}: {error}") from error


def _load(config: Config, progress: Progress, accept_terms: Callable[[str], bool]) -> Parts:
    timeline: list[tuple[str, float]] = []
    with _stage(timeline, "find"):
        path = resolve(
            config.model.name,
            revision=config.model.revision,
            accept_terms=accept_terms,
            progress=progress,
        )
    with _stage(timeline, "open"):
        checkpoint = open_checkpoint(path)
        try:
            backend, kv_dtype = select_backend(
                config.execution.backend,
                dtype=config.model.dtype,
                cache_dtype=config.cache.dtype,
                threads=config.execution.threads,
                instructions=config.execution.instructions,
                packed_file=_packed_file(config, path),
            )
        except ValueError as error:
            raise ConfigError(f"execution.backend: {error}") from error
    with _stage(timeline, "tokenizer"):
        tokenizer = open_tokenizer(checkpoint)
    with _stage(timeline, "weights"):
        model = load_model(checkpoint, backend, lambda done, total: progress("load", done, total))
    parts, runner = _assemble(config, model, backend, tokenizer, kv_dtype)
    parts.fingerprint = _fingerprint(path, f"{backend.describe()} {config.model.dtype}", kv_dtype)
    with _stage(timeline, "warm-up"):
        _warm_up(runner, parts, config, progress)
    parts.timeline = timeline
    size = backend.loaded_bytes() / 1e6
    parts.device = f"CPU, {backend.describe()}, {size:.0f} MB of weights, {kv_dtype} KV cache"
    return parts


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that belongs to a checkpoint."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return tokenizer_from_gguf(checkpoint.metadata, checkpoint.path.name)
    return load_tokenizer(checkpoint.path, checkpoint.config)


def served_name(config: Config) -> str:
    """The name that clients use: as configured, a known model's, or the path's last part."""
    if config.model.served_name:
        return config.model.served_name
    if config.model.name in KNOWN_MODELS:
        return config.model.name
    return Path(config.model.name.split(":", 1)[-1]).name.removesuffix(".gguf")


def _assemble(
    config: Config, model: Model, backend: Backend, tokenizer: Tokenizer, kv_dtype: CacheDType
) -> tuple[Parts, Runner]:
    """Size the cache, record the model, and put scheduler and stepper together."""
    shape, section, batch = model.config, config.cache, config.scheduler
    context = min(shape.max_context, config.model.max_context or shape.max_context)
    if context < 2:
        raise ConfigError("model.max_context is 1; a prompt and its answer need at least 2 tokens")
    layout = CacheLayout(shape.layers, shape.heads, section.page_size, kv_dtype, context)
    pages = cache_pages(section, layout, context, batch.max_running)
    try:
        backend.allocate_cache(layout, pages)
    except ValueError as error:
        raise ConfigError(f"{error}; execution.backend=torch takes any") from error
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    program = backend.compile(tape, batch.max_batch_tokens)
    context = min(context, pages * section.page_size)
    staging = StagingShape(
        tokens=batch.max_batch_tokens,
        slots=batch.max_running,
        pages_per_sequence=-(-context // section.page_size),
        page_size=section.page_size,
        vocab_size=shape.vocab_size,
    )
    runner = Runner(backend, program, staging)
    clock = MonotonicClock()
    limits = SchedulerLimits(
        batch.max_batch_tokens,
        batch.max_running,
        batch.prefill_beside_decodes,
        section.prefix_caching,
    )
    parts = Parts(
        model_name=served_name(config),
        tokenizer=tokenizer,
        vocab_size=shape.vocab_size,
        scheduler=Scheduler(PagePool(pages, section.page_size), limits, clock),
        stepper=ThreadStepper(runner),
        limits=Limits(context, batch.max_waiting, batch.max_waiting_tokens),
        fingerprint=b"",
        clock=clock,
    )
    return parts, runner


def _warm_up(runner: Runner, parts: Parts, config: Config, progress: Progress) -> None:
    """Run a full prefill and a decode, so that no user pays for first-call set-up."""
    size = config.cache.page_size
    count = min(config.scheduler.max_batch_tokens, parts.limits.context - 1)
    request = Request(
        id="warm-up",
        prompt_ids=(0,) * count,
        sampling=SamplingParams(temperature=1.0),
        max_tokens=1,
        seed=0,
        arrival=0.0,
    )
    sequence = Sequence(request, 0, fingerprint=b"")
    sequence.pages = list(range(-(-(count + 1) // size)))
    sequence.slot = 0
    for number, (start, length) in enumerate(((0, count), (count - 1, 1))):
        chunk = Chunk(sequence, start, length, 1, sample=True)
        runner.fill(Plan(0, [chunk], [sequence]))
        runner.run()
        progress("warm-up", number + 1, 2)


def _fingerprint(path: Path, weights: str, kv_dtype: str) -> bytes:
    """Names the numbers that a cached page depends on: the weights' file, and both formats."""
    text = repr((_identity(path), weights, kv_dtype, np.dtype(np.int32).byteorder))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _identity(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files that hold the weights and say how to read them."""
    files = [path]
    if path.is_dir():
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _packed_file(config: Config, path: Path) -> tuple[Path, str] | None:
    """Where packed weights are kept, and what they are made from; None if they are not to be."""
    if not config.model.keep_packed:
        return None
    dtype = config.model.dtype
    # One file for each source and format: a new version of the source takes the old one's place.
    place = hashlib.blake2b(repr((str(path.resolve()), dtype)).encode(), digest_size=8).hexdigest()
    file = cache_folder() / "packed" / f"{path.stem[:40]}-{place}.packed"
    return file, repr((_identity(path), dtype))


@contextmanager
def _stage(timeline: list[tuple[str, float]], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timeline.append((name, time.perf_counter() - start))
