"""One rank: a model, or its shard of one, in place on a device."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from engine.config import CacheSection, Config
from engine.errors import ConfigError
from engine.execution.ahead import Ahead
from engine.execution.cache import Cache, ColdFile, Store
from engine.execution.filled import StagingShape
from engine.execution.masks import Masks
from engine.execution.memory import CacheSize, Footprint, available_memory, private_memory
from engine.execution.runner import Runner
from engine.models import Model, cache_layout, load_model
from engine.models.shard import Shard
from engine.text.grammar import GrammarCompiler
from engine.weights.checkpoint import Checkpoint
from engine.weights.checksums import check_files
from engine.weights.files import weight_files
from engine.weights.sources import cache_folder
from kernels.backend import (
    Backend,
    CacheDType,
    Pages,
    WeightFormat,
    available_cores,
    select_backend,
)
from kernels.collectives import Place
from kernels.tape import Recorder

logger = logging.getLogger("ryzanstein.engine")


class RankFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is, once its weights are in place; sizes are bytes. The same `description` means
    the same numbers. `free` is None where the cache lies in the host's memory; `program` is the
    interpreter's and its libraries' memory; `files` names the model's, with sizes and times;
    `footprint` is what sequences take."""

    description: str
    hardware: str
    kv_dtype: CacheDType
    vocab_size: int
    context: int
    footprint: Footprint
    weights: int
    program: int
    free: int | None
    seconds: float
    files: str

    @property
    def identity(self) -> tuple[object, ...]:
        """What another has to share to take this one's place."""
        return (self.description, self.kv_dtype, self.context, self.footprint, self.files)


class Rank:
    """Loads the weights; `allocate` then makes what runs steps."""

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        place: Place | None,
        progress: Callable[[int, int], None],
    ) -> None:
        start, before = time.perf_counter(), private_memory()
        self._config = config
        execution = config.execution
        shard = Shard() if place is None else Shard(place.rank, place.ranks)
        self._ranks = shard.ranks
        cores = max(1, available_cores() // shard.ranks)
        if execution.threads > cores:
            logger.warning(
                "execution.threads is %d of %d cores: threads that share one wait for each other",
                execution.threads,
                cores,
            )
        try:
            self._backend, kv_dtype = select_backend(
                execution.backend,
                dtype=config.model.dtype,
                cache_dtype=config.cache.dtype,
                threads=execution.threads or cores,
                instructions=execution.instructions,
                packed_file=_packed_file(config, checkpoint.path, shard, config.model.dtype),
                batch_invariant=execution.batch_invariant,
                place=place,
            )
        except ValueError as error:
            raise ConfigError(f"execution.backend: {error}") from error
        # A GPU has other kernels for other shapes, and to meet costs it more.
        exact = execution.exact_ranks and self._backend.name != "triton"
        if config.model.checksums:
            check_files(checkpoint.path, config.model.checksums, shard.rank, shard.ranks)
        self._models, weights = self._place(checkpoint, shard, progress, exact=exact)
        shape = self._models[0].config
        context = min(shape.max_context, config.model.max_context or shape.max_context)
        if context < 2:
            raise ConfigError(
                "model.max_context is 1; a prompt and its answer need at least 2 tokens"
            )
        size = config.cache.page_size
        layout = cache_layout(self._models[0], size, kv_dtype, context)
        self._layout = replace(layout, latents_once=self._backend.latents_once)
        description = self._backend.describe()
        if place is not None and not (exact and self._backend.name == "native"):
            description += f" on {place.ranks} ranks"
        if config.model.busy_dtype != "none":
            description += f", {config.model.busy_dtype} weights while busy"
        self.facts = RankFacts(
            description=description,
            hardware=self._backend.hardware,
            kv_dtype=kv_dtype,
            vocab_size=shape.vocab_size,
            context=context,
            footprint=Footprint(
                page=self._layout.bytes_per_page,
                window_page=self._layout.bytes_per_window_page,
                window=self._layout.window,
                state=self._layout.state_bytes,
            ),
            weights=weights,
            program=before,
            free=self._backend.free_bytes(),
            seconds=time.perf_counter() - start,
            files=repr(weights_identity(checkpoint.path)),
        )

    def abort(self) -> None:
        """Let the other ranks know that this one will not meet them again."""
        if self._backend.collectives is not None:
            self._backend.collectives.abort()

    def allocate(self, size: CacheSize, compiler: GrammarCompiler) -> Runner:
        """A runner with a cache of this size. Raises ConfigError if the kernels have no such
        cache."""
        pages, windows = size.pages, size.window_pages
        batch, backend, layout = self._config.scheduler, self._backend, self._layout
        try:
            # One page more, for what is written for nobody.
            states = batch.max_running + size.snapshots
            backend.allocate_cache(layout, pages + 1, states, windows + 1 if windows else 0)
        except ValueError as error:
            raise ConfigError(f"{error}; execution.backend=torch takes any") from error
        programs = []
        for model in self._models:
            recorder = Recorder()
            tape = recorder.finish(model.forward(recorder))
            programs.append(backend.compile(tape, batch.max_batch_tokens, batch.max_running))
        context = min(layout.max_context, pages * layout.page_size)
        staging = StagingShape(
            slots=batch.max_running,
            pages=pages,
            pages_per_sequence=-(-context // layout.page_size),
            page_size=layout.page_size,
            vocab_size=self.facts.vocab_size,
            states=layout.delta is not None,
            window_pages=windows,
        )
        pools = [(backend.pages(), pages)]
        if windows:
            pools.append((backend.pages(windowed=True), windows))
        cache = _cache(self._config.cache, backend, layout.dtype, pools, self._ranks)
        # What ranks have done is told by Python, step by step.
        queued = self._backend.collectives is None
        return Runner(backend, programs, cache, staging, Masks(compiler), queued=queued)

    def _place(
        self,
        checkpoint: Checkpoint,
        shard: Shard,
        progress: Callable[[int, int], None],
        *,
        exact: bool,
    ) -> tuple[list[Model], int]:
        """The model, again for busy times if its weights are to be narrower then, and bytes."""
        backend, busy = self._backend, self._config.model.busy_dtype
        others = None
        if busy != "none":
            packed = _packed_file(self._config, checkpoint.path, shard, busy)
            try:
                others = backend.other_weights(busy, packed)
            except ValueError as error:
                raise ConfigError(f"model.busy_dtype: {error}") from error
        context = self._config.model.max_context
        place = partial(load_model, checkpoint, exact=exact, max_context=context)
        models = [place(backend, progress, shard)]
        weights = backend.loaded_bytes()
        if others is None:
            return models, weights
        models.append(place(others, progress, shard))
        more = others.loaded_bytes(shared=True)
        if more >= weights:
            raise ConfigError(
                f"model.busy_dtype is {busy}: {more / 1e6:.0f} MB of weights, where those of quiet "
                f"times take {weights / 1e6:.0f}; choose a narrower one, or none"
            )
        return models, weights + others.loaded_bytes()


def weights_identity(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files that hold the weights and say how to read them."""
    files = weight_files(path)
    if path.is_dir():
        files = [path / "config.json", *files]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _ahead(memory: int, pools: list[tuple[Pages, int]]) -> list[Ahead]:
    """What takes `memory` for the pools' pages, of which there are so many, ahead of their use,
    while half of what the system has left now is there."""
    left = available_memory()
    total = sum(pages.page_bytes * count for pages, count in pools)
    if left is None or not total:
        return []
    enough = partial(_is_left, left // 2)
    share = min(1.0, memory / total)
    return [Ahead(pages, count, math.ceil(share * count), enough) for pages, count in pools]


def _is_left(memory: int) -> bool:
    left = available_memory()
    return left is not None and left > memory


def _cache(
    section: CacheSection,
    backend: Backend,
    kv_dtype: str,
    pools: list[tuple[Pages, int]],
    ranks: int,
) -> Cache:
    """The cache of this many pages, and window pages if there are any, on one of the ranks; and
    where its evicted pages go."""
    cold_slots = section.cold_tokens // section.page_size
    stores = [Store(pages) for pages, _ in pools]
    cold = None
    if cold_slots:
        if section.cold_dtype != "auto" and section.cold_dtype != kv_dtype:
            try:
                codecs = [
                    backend.page_codec(section.cold_dtype, windowed=number > 0)
                    for number in range(len(pools))
                ]
            except ValueError as error:
                raise ConfigError(str(error)) from error
            stores = [Store(s.pages, codec) for s, codec in zip(stores, codecs, strict=True)]
        folder = Path(section.cold_folder) if section.cold_folder else cache_folder() / "cold"
        cold = ColdFile(folder, cold_slots, sum(store.cold_bytes for store in stores))
    ahead = _ahead((section.ahead_mb << 20) // ranks, pools)
    return Cache(stores[0], cold, backend.states(), stores[1] if stores[1:] else None, ahead)


def _packed_file(
    config: Config, path: Path, shard: Shard, dtype: WeightFormat
) -> tuple[Path, str] | None:
    """Where packed weights are kept, and what they are made from; None if they are not to be."""
    if not config.model.keep_packed:
        return None
    made = (dtype, shard.rank, shard.ranks, config.execution.exact_ranks)
    # One file for each source and format: a new version of the source takes the old one's place.
    text = repr((str(path.resolve()), made))
    place = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    file = cache_folder() / "packed" / f"{path.stem[:40]}-{place}.packed"
    return file, repr((weights_identity(path), made))
