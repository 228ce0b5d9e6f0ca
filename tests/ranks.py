"""Ranks as threads of one process: each has its own backend, and they meet in shared memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.models import cache_layout, load_model
from engine.models.shard import Shard
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import Program, select_backend
from kernels.collectives import Place, shared_memory
from kernels.tape import Recorder, Tape
from tests.kernels.native import chunks_batch

PAGE, PAGES = 16, 40
R = TypeVar("R")


@contextmanager
def places(ranks: int) -> Iterator[list[Place]]:
    """A place for each rank."""
    memory = shared_memory()
    try:
        yield [Place(rank, ranks, memory) for rank in range(ranks)]
    finally:
        os.close(memory)


def on_ranks(ranks: int, work: Callable[[Place], R]) -> list[R]:
    """What `work` returns on each rank; the first exception otherwise."""
    with places(ranks) as every, ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, every))


def program_of(
    path: Path,
    backend_name: str,
    place: Place | None,
    *,
    exact: bool = False,
    dtype: Any = "float32",
    cache: Any = "float32",
) -> tuple[Program, Tape]:
    """A model, or a rank's part of it, ready to run."""
    backend, _ = select_backend(
        backend_name, dtype=dtype, cache_dtype="auto", threads=1, place=place
    )
    shard = Shard() if place is None else Shard(place.rank, place.ranks)
    model = load_model(open_checkpoint(path), backend, shard=shard, exact=exact)
    backend.allocate_cache(cache_layout(model, PAGE, cache, 512), PAGES, states=8)
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))
    return backend.compile(tape, 512), tape


def logits_of(program: Program, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every position, the prompt computed in chunks of these sizes."""
    import numpy as np

    table = np.random.default_rng(0).permutation(PAGES)[None].astype(np.int32)
    logits, start = [], 0
    for count in chunks:
        program.forward(chunks_batch([tokens[start : start + count]], [start], table, PAGE))
        logits.append(program.logits().clone())
        start += count
    return torch.cat(logits)
