"""From a configuration to everything that an engine needs to run: tokenizer, scheduler, stepper."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from engine.config import Config
from engine.errors import ConfigError, DeviceLost
from engine.execution.device import Device, place_model, stage, whole_footprint
from engine.execution.memory import (
    Budget,
    available_memory,
    private_memory,
    read_pressure,
)
from engine.execution.profile import Shape, load_or_measure
from engine.execution.rank import weights_identity
from engine.execution.recommended import recommended_sampling
from engine.execution.tokenizer import open_tokenizer
from engine.parts import Parts
from engine.scheduling.admission import Limits
from engine.scheduling.budget import Pace, SchedulerLimits
from engine.scheduling.cold import ColdIndex
from engine.scheduling.controller import CacheController
from engine.scheduling.cost import CostModel
from engine.scheduling.pages import PagePool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.snapshots import Snapshots
from engine.scheduling.window_pages import WindowPages
from engine.text.tokenizer import Tokenizer
from engine.types import MonotonicClock
from engine.upkeep import Upkeep
from engine.version import VERSION
from engine.weights.checkpoint import open_checkpoint
from engine.weights.sources import KNOWN_MODELS, Progress, cache_folder, resolve
from kernels.backend import available_cores, build_identity

# Memory that is short, in bytes; an eighth of what was left at start if that is less.
LOW_MEMORY = 512 << 20
# Tokens that are guessed at once on a CPU, where nothing else is asked for.
CPU_GUESSES = 8


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
    with stage(timeline, "find"):
        path = resolve(
            config.model.name,
            revision=config.model.revision,
            accept_terms=accept_terms,
            progress=progress,
        )
    with stage(timeline, "open"):
        checkpoint = open_checkpoint(path)
    with stage(timeline, "tokenizer"):
        tokenizer = open_tokenizer(checkpoint)
        recommended = {}
        if config.model.recommended_sampling:
            recommended = recommended_sampling(checkpoint, config.model.name)
    device = place_model(config, checkpoint, tokenizer, partial(progress, "load"), timeline)
    try:
        parts = _finish(config, path, device, tokenizer, progress, timeline)
    except DeviceLost as error:
        device.stepper.close()
        raise ConfigError("the model's ranks were lost while they were measured") from error
    except BaseException:
        device.stepper.close()
        raise
    parts.timeline = timeline
    parts.recommended = recommended
    return parts


def _finish(
    config: Config,
    path: Path,
    device: Device,
    tokenizer: Tokenizer,
    progress: Progress,
    timeline: list[tuple[str, float]],
) -> Parts:
    """Measure the model in place, and put everything together."""
    facts, shape = device.facts, device.shape
    # What came back from a tier that rounds is not what was computed.
    rounded = config.cache.cold_dtype if config.cache.cold_tokens else "auto"
    formats = (facts[0].description, config.model.dtype, facts[0].kv_dtype, rounded)
    fingerprint = _fingerprint(path, formats)
    two = config.model.busy_dtype != "none"
    profiles = []
    with stage(timeline, "profile"):
        for busy in (False, True)[: 1 + two]:
            file = _profile_file(config, fingerprint, shape, busy=busy)
            report = partial(progress, "profile")
            profiles.append(load_or_measure(file, device.run, shape, report, busy=busy))
    parts = _assemble(config, device, tokenizer, CostModel(*profiles))
    parts.fingerprint = fingerprint
    on_host = facts[0].free is None
    footprint = whole_footprint(facts)
    left = sum(rank.free or 0 for rank in facts) or available_memory() or 4 << 30
    weights = sum(rank.weights for rank in facts)
    state, size = footprint.state, device.size
    held = size.bytes(footprint) + (config.scheduler.max_running + size.snapshots) * state
    parts.budget = Budget(
        # One rank is this process, before it had weights; several have one each beside it.
        program=sum(rank.program for rank in facts) + (private_memory() if len(facts) > 1 else 0),
        weights=weights,
        activations=device.buffers,
        cache=held,
        headroom=max(0, left - (held if on_host else 0)),
    )
    # Window pages are few, and stay.
    page_bytes = footprint.page - (footprint.window_page if size.window_pages else 0)
    if config.cache.adaptive and on_host and page_bytes:
        floor = -(-shape.context // shape.page_size)
        low = min(LOW_MEMORY, left // 8)
        controller = CacheController(parts.scheduler.pool, page_bytes, low, floor)
        parts.upkeep = Upkeep(parts.scheduler, controller, read_pressure)
    parts.device = (
        f"{facts[0].hardware}, {facts[0].description}, {weights / 1e6:.0f} MB of weights, "
        f"{facts[0].kv_dtype} KV cache"
    )
    if size.window_pages:
        tokens = size.window_pages * config.cache.page_size
        parts.device += f", {tokens} tokens of it in layers that see {footprint.window}"
    if state:
        parts.device += f", states of {state / 1e6:.1f} MB, {size.snapshots} kept for others"
    return parts


def served_name(config: Config) -> str:
    """The name that clients use: as configured, a known model's, or the path's last part."""
    if config.model.served_name:
        return config.model.served_name
    if config.model.name in KNOWN_MODELS:
        return config.model.name
    return Path(config.model.name.split(":", 1)[-1]).name.removesuffix(".gguf")


def _assemble(config: Config, device: Device, tokenizer: Tokenizer, cost: CostModel) -> Parts:
    """Put scheduler and stepper together."""
    section, batch, shape = config.cache, config.scheduler, device.shape
    clock = MonotonicClock()
    limits = SchedulerLimits(
        max_batch_tokens=batch.max_batch_tokens,
        max_running=batch.max_running,
        pace=Pace(batch.target_itl_ms / 1e3, batch.max_step_ms / 1e3),
        max_prefilling=batch.max_prefilling,
        patience=batch.patience_seconds,
        prefix_caching=section.prefix_caching,
        lease=section.lease_seconds,
        speculative_tokens=_guesses(batch.speculative_tokens, device),
    )
    # A page of a prompt among many, as a restored page would spare it.
    page_seconds = cost.token_seconds(batch.max_batch_tokens) * section.page_size
    windows = None
    if device.size.window_pages:
        footprint = device.facts[0].footprint
        windows = WindowPages(
            device.size.window_pages,
            footprint.window,
            section.page_size,
            shape.pages,
            batch.max_batch_tokens,
        )
    scheduler = Scheduler(
        PagePool(shape.pages, section.page_size, section.eviction, windows),
        limits,
        clock,
        cost,
        cold=ColdIndex(section.cold_tokens // section.page_size, page_seconds),
        # Places of states follow those of who runs.
        snapshots=(
            Snapshots(batch.max_running, device.size.snapshots) if _recurrent(device) else None
        ),
    )
    return Parts(
        model_name=served_name(config),
        tokenizer=tokenizer,
        vocab_size=device.facts[0].vocab_size,
        scheduler=scheduler,
        stepper=device.stepper,
        limits=Limits(shape.context, batch.max_waiting, batch.max_waiting_tokens),
        fingerprint=b"",
        compiler=device.compiler,
        clock=clock,
    )


def _recurrent(device: Device) -> bool:
    """Whether the model's layers keep states."""
    return device.facts[0].footprint.state > 0


def _guesses(wanted: int | Literal["auto"], device: Device) -> int:
    """How many tokens are guessed at once. A GPU, which runs steps behind each other, would have to
    wait for each: it guesses only if it is told to. A state cannot take back what was wrong."""
    if wanted != "auto":
        if wanted and _recurrent(device):
            raise ConfigError(
                f"scheduler.speculative_tokens is {wanted}, but the model's layers keep a state, "
                "which wrong guesses could not be taken out of; leave it at auto, or 0"
            )
        return wanted
    return CPU_GUESSES if device.facts[0].free is None and not _recurrent(device) else 0


def _profile_file(config: Config, fingerprint: bytes, shape: Shape, *, busy: bool) -> Path:
    """Where the profile of this model on this machine and build is kept, of quiet or busy steps."""
    processor = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line for line in lines if line.startswith("model name")), "")
    machine = (platform.machine(), platform.release(), processor, available_cores())
    ways = (config.execution.threads, config.execution.tensor_parallel)
    # Where memory decides how many pages there are, every start has another number of them.
    text = repr((fingerprint, machine, ways, build_identity(), VERSION, shape.measured, busy))
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return cache_folder() / "profiles" / f"{name}.json"


def _fingerprint(path: Path, formats: tuple[str, ...]) -> bytes:
    """Names the numbers that a cached page depends on: the weights' file, and all formats."""
    text = repr((weights_identity(path), formats, np.dtype(np.int32).byteorder))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
