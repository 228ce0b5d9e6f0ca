"""Layers that keep states, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.gpu.backend import GpuBackend
from kernels.gpu.program import GpuProgram
from tests.kernels.gpu.filled import program_of
from tests.kernels.gpu.test_program import SIZE, logits_of, reference_logits
from tests.kernels.native import chunks_batch
from tests.tiny import CONV, DELTA, write_llama

TABLES = np.arange(60, dtype=np.int32).reshape(2, 30)


@pytest.fixture(scope="module", params=[DELTA, CONV], ids=["delta nets", "convolutions"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("states"), **request.param)


@pytest.fixture(scope="module")
def program(folder: Path) -> tuple[GpuProgram, GpuBackend]:
    with np.errstate(all="ignore"):
        return program_of(folder)


def test_a_model_that_keeps_states_gives_the_references_logits(
    folder: Path, program: tuple[GpuProgram, GpuBackend]
) -> None:
    for ours, theirs in zip(logits_of(program[0]), reference_logits(folder), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_state_that_was_kept_is_gone_on_from(program: tuple[GpuProgram, GpuBackend]) -> None:
    """Kept behind so many rows of a chunk, whether these are more than the taps or fewer."""
    compiled, backend = program
    tokens = list(range(40, 53))

    def run(part: list[int], start: int, rows: int = -1, place: int = 0) -> torch.Tensor:
        table = TABLES[:1] if part[0] >= 40 else TABLES[1:2]
        batch = chunks_batch([part], [start], table, SIZE)
        keeping = {"kept_rows": np.array([rows], np.int32), "kept_at": np.array([place], np.int32)}
        compiled.forward(replace(batch, **keeping))
        return compiled.logits()[-3:].clone()

    run(tokens[:3], 0, rows=3, place=6)
    expected = None
    for kept in (0, 2, 3, 7):
        backend.states().copy(6, 0)
        run(tokens[3:10], 3, rows=kept, place=5)
        if expected is None:
            expected = run(tokens[10:], 10)
        else:
            run([1, 2, 3], 0)  # another takes the slot
        backend.states().copy(5, 0)
        assert torch.allclose(run(tokens[3 + kept :], 3 + kept), expected, atol=1e-4)


def test_steps_of_bf16_round_and_do_nothing_else(folder: Path) -> None:
    found = logits_of(program_of(folder, weights="bfloat16", cache="bfloat16")[0])
    for ours, theirs in zip(found, reference_logits(folder), strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 0.1
