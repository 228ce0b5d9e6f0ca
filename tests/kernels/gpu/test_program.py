"""Whole models on the GPU backend, padding and page moves included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.backend import select_backend
from kernels.gpu.program import buckets
from tests.kernels.gpu.filled import program_of
from tests.kernels.native import chunks_batch
from tests.kernels.test_sampling import options
from tests.tiny import write_llama

SIZE = 4
# More tokens than a row bucket, chunks of every kind, and one that decodes.
STEPS: list[tuple[list[int], list[int]]] = [
    ([9, 1, 5], [0, 0, 0]),
    ([1, 1, 1], [9, 1, 5]),
    ([3, 8], [10, 2]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def logits_of(program: Any) -> list[torch.Tensor]:
    """Logits of every row of STEPS."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(120).reshape(4, 30).astype(np.int32)
    found = []
    for counts, starts in STEPS:
        tokens = [rng.integers(0, 260, count).tolist() for count in counts]
        program.forward(chunks_batch(tokens, starts, tables, SIZE))
        found.append(program.logits().clone())
    return found


def test_a_model_gives_the_references_logits_at_every_mixture(folder: Path) -> None:
    from engine.models import load_model
    from engine.weights.checkpoint import open_checkpoint
    from kernels.backend import CacheLayout
    from kernels.ops import Recorder

    backend, _ = select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(folder), backend)
    backend.allocate_cache(CacheLayout(2, model.config.heads, SIZE, "float32"), 128)
    recorder = Recorder()
    wanted = logits_of(backend.compile(recorder.finish(model.forward(recorder)), 512))
    for ours, theirs in zip(logits_of(program_of(folder)[0]), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    narrow = logits_of(program_of(folder, weights="bfloat16", cache="bfloat16")[0])
    for ours, theirs in zip(narrow, wanted, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 0.05


def test_sampling_returns_ids_logprobs_and_the_best(folder: Path) -> None:
    program, _ = program_of(folder)
    logits = logits_of(program)[-1]
    samples = program.sample(options(len(logits), temperature=0, top_logprobs=2))
    assert samples.ids == logits.argmax(-1).tolist()
    wanted = torch.log_softmax(logits, -1).max(-1).values
    assert samples.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)
    assert [best[0][0] for best in samples.top] == samples.ids
    assert all(len(best) == 2 for best in samples.top)


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_pages_are_copied_and_go_to_the_host_and_back(folder: Path, cache: str) -> None:
    program, backend = program_of(folder, cache=cache)
    logits_of(program)
    pages = backend.pages()
    block, other = (np.zeros(pages.page_bytes, np.uint8) for _ in range(2))
    used = int(np.random.default_rng(0).permutation(120)[0])
    pages.read(used, block)
    assert block.any()
    pages.copy(used, 127)
    pages.read(127, other)
    assert (block == other).all()
    pages.write(block[::-1].copy(), 126)
    pages.read(126, other)
    assert (other == block[::-1]).all()
    pages.discard([126])


def test_sizes_are_rounded_up_to_few() -> None:
    assert buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert buckets(100, 16) == [16, 24, 32, 48, 64, 96, 100]
    assert len(buckets(2048, 16)) == 15


def test_what_cannot_be_held_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="int4 takes the native kernels"):
        program_of(folder, cache="int4")
    with pytest.raises(ValueError, match="cannot serve"):
        select_backend("triton", dtype="auto", cache_dtype="auto", threads=1)
    with pytest.raises(ValueError, match="for a GPU"):
        select_backend("auto", dtype="int4", cache_dtype="auto", threads=1)
