"""From a configuration to everything that an engine needs to run: tokenizer, scheduler, stepper."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np

from engine.config import CacheSection, Config
from engine.errors import ConfigError
from engine.execution.cache import Cache, ColdFile
from engine.execution.memory import (
    Budget,
    available_memory,
    cache_pages,
    private_memory,
    read_pressure,
)
from engine.execution.profile import Shape, load_or_measure
from engine.execution.runner import Runner, StagingShape
from engine.execution.stepper import AheadStepper, Stepper, ThreadStepper
from engine.models import Model, load_model
from engine.scheduling.admission import Limits
from engine.scheduling.budget import Pace, SchedulerLimits
from engine.scheduling.cold import ColdIndex
from engine.scheduling.controller import CacheController
from engine.scheduling.cost import CostModel
from engine.scheduling.pages import PagePool
from engine.scheduling.scheduler import Scheduler
from engine.text.gguf_tokenizer import tokenizer_from_gguf
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.types import Clock, MonotonicClock
from engine.upkeep import Upkeep
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.gguf import GGUFCheckpoint
from engine.weights.sources import KNOWN_MODELS, Progress, cache_folder, resolve
from kernels.backend import (
    Backend,
    CacheDType,
    CacheLayout,
    available_cores,
    build_identity,
    select_backend,
)
from kernels.ops import Recorder

# Memory that is short, in bytes; an eighth of what was left at start if that is less.
LOW_MEMORY = 512 << 20


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
    budget: Budget | None = None
    upkeep: Callable[[], bool] = lambda: False
    """Adjusts the cache to the memory that is left; True if a step has to give some back."""

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
    before = private_memory()
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
                batch_invariant=config.execution.batch_invariant,
            )
        except ValueError as error:
            raise ConfigError(f"execution.backend: {error}") from error
    with _stage(timeline, "tokenizer"):
        tokenizer = open_tokenizer(checkpoint)
    with _stage(timeline, "weights"):
        model = load_model(checkpoint, backend, lambda done, total: progress("load", done, total))
    with _stage(timeline, "cache"):
        runner, cold_slots, shape = _allocate(config, model, backend, kv_dtype)
    # What came back from a tier that rounds is not what was computed.
    rounded = config.cache.cold_dtype if config.cache.cold_tokens else "auto"
    formats = (f"{backend.describe()} {config.model.dtype}", kv_dtype, rounded)
    fingerprint = _fingerprint(path, formats)
    with _stage(timeline, "profile"):
        profile = load_or_measure(
            _profile_file(config, fingerprint, shape),
            runner,
            shape,
            lambda done, total: progress("profile", done, total),
        )
    parts = _assemble(config, model, tokenizer, CostModel(profile), runner, cold_slots, shape)
    parts.fingerprint = fingerprint
    page_bytes = runner.page_bytes
    on_host = backend.free_bytes() is None
    left = backend.free_bytes() or available_memory() or 4 << 30
    parts.budget = Budget(
        program=before,
        weights=backend.loaded_bytes(),
        activations=runner.buffer_bytes(),
        cache=(shape.pages + 1) * page_bytes,
        headroom=max(0, left - (shape.pages * page_bytes if on_host else 0)),
    )
    if config.cache.adaptive and on_host:
        floor = -(-shape.context // shape.page_size)
        low = min(LOW_MEMORY, left // 8)
        controller = CacheController(parts.scheduler.pool, page_bytes, low, floor)
        parts.upkeep = Upkeep(parts.scheduler, controller, read_pressure)
    parts.timeline = timeline
    size = backend.loaded_bytes() / 1e6
    parts.device = (
        f"{backend.hardware}, {backend.describe()}, {size:.0f} MB of weights, {kv_dtype} KV cache"
    )
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


def _allocate(
    config: Config, model: Model, backend: Backend, kv_dtype: CacheDType
) -> tuple[Runner, int, Shape]:
    """Size the cache, record the model, and make the runner; also the cold tier's slots."""
    shape, section, batch = model.config, config.cache, config.scheduler
    context = min(shape.max_context, config.model.max_context or shape.max_context)
    if context < 2:
        raise ConfigError("model.max_context is 1; a prompt and its answer need at least 2 tokens")
    layout = CacheLayout(shape.layers, shape.heads, section.page_size, kv_dtype, context)
    pages = cache_pages(section, layout, context, batch.max_running, backend.free_bytes())
    try:
        # One page more, for what is written for nobody.
        backend.allocate_cache(layout, pages + 1)
    except ValueError as error:
        raise ConfigError(f"{error}; execution.backend=torch takes any") from error
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    program = backend.compile(tape, batch.max_batch_tokens, batch.max_running)
    context = min(context, pages * section.page_size)
    cold_slots = section.cold_tokens // section.page_size
    cache = _cache(section, backend, kv_dtype, cold_slots)
    staging = StagingShape(
        slots=batch.max_running,
        pages=pages,
        pages_per_sequence=-(-context // section.page_size),
        page_size=section.page_size,
        vocab_size=shape.vocab_size,
    )
    runner = Runner(backend, program, cache, staging)
    step = Shape(batch.max_batch_tokens, batch.max_running, context, section.page_size, pages)
    return runner, cold_slots, step


def _cache(section: CacheSection, backend: Backend, kv_dtype: str, cold_slots: int) -> Cache:
    """The cache, and where its evicted pages go."""
    pages = backend.pages()
    if not cold_slots:
        return Cache(pages)
    codec, page_bytes = None, pages.page_bytes
    if section.cold_dtype != "auto" and section.cold_dtype != kv_dtype:
        try:
            codec = backend.page_codec(section.cold_dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        page_bytes = codec.page_bytes
    folder = Path(section.cold_folder) if section.cold_folder else cache_folder() / "cold"
    return Cache(pages, ColdFile(folder, cold_slots, page_bytes), codec)


def _assemble(
    config: Config,
    model: Model,
    tokenizer: Tokenizer,
    cost: CostModel,
    runner: Runner,
    cold_slots: int,
    shape: Shape,
) -> Parts:
    """Put scheduler and stepper together."""
    section, batch = config.cache, config.scheduler
    clock = MonotonicClock()
    limits = SchedulerLimits(
        max_batch_tokens=batch.max_batch_tokens,
        max_running=batch.max_running,
        pace=Pace(batch.target_itl_ms / 1e3, batch.max_step_ms / 1e3),
        max_prefilling=batch.max_prefilling,
        patience=batch.patience_seconds,
        prefix_caching=section.prefix_caching,
    )
    # A page of a prompt among many, as a restored page would spare it.
    page_seconds = cost.token_seconds(batch.max_batch_tokens) * section.page_size
    scheduler = Scheduler(
        PagePool(shape.pages, section.page_size, section.eviction),
        limits,
        clock,
        cost,
        cold=ColdIndex(cold_slots, page_seconds),
    )
    return Parts(
        model_name=served_name(config),
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        scheduler=scheduler,
        stepper=AheadStepper(runner) if runner.runs_behind else ThreadStepper(runner),
        limits=Limits(shape.context, batch.max_waiting, batch.max_waiting_tokens),
        fingerprint=b"",
        clock=clock,
    )


def _profile_file(config: Config, fingerprint: bytes, shape: Shape) -> Path:
    """Where the profile of this model on this machine and build is kept."""
    processor = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line for line in lines if line.startswith("model name")), "")
    machine = (platform.machine(), platform.release(), processor, available_cores())
    threads = config.execution.threads
    text = repr(
        (fingerprint, machine, threads, build_identity(), package_version("ryzanstein"), shape)
    )
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return cache_folder() / "profiles" / f"{name}.json"


def _fingerprint(path: Path, formats: tuple[str, ...]) -> bytes:
    """Names the numbers that a cached page depends on: the weights' file, and all formats."""
    text = repr((_identity(path), formats, np.dtype(np.int32).byteorder))
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
