"""Layers that keep states, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("kept", [0, 2, 3, 7])
def test_a_state_that_was_kept_is_gone_on_from(
    program: tuple[GpuProgram, GpuBackend], kept: int
) -> None:
    """Kept behind so many rows of a chunk, whether these are more than the taps or fewer."""
    compiled, backend = program
    tokens = list(range(40, 53))

    def run(part: list[int], start: int, table: int = 0, **keeping: Any) -> torch.Tensor:
        batch = chunks_batch([part], [start], TABLES[table : table + 1], SIZE)
        compiled.forward(replace(batch, **keeping))
        return compiled.logits().clone()

    run(tokens[:3], 0)
    places = {"kept_rows": np.array([kept], np.int32), "kept_at": np.array([5], np.int32)}
    expected = run(tokens[3:10], 3, **places)
    expected = torch.cat((expected, run(tokens[10:], 10)))
    run([1, 2, 3], 0, 1)  # another takes the slot
    backend.states().copy(5, 0)
    assert torch.allclose(run(tokens[3 + kept :], 3 + kept)[-3:], expected[-3:], atol=1e-4)


def test_steps_of_bf16_round_and_do_nothing_else(folder: Path) -> None:
    found = logits_of(program_of(folder, weights="bfloat16", cache="bfloat16")[0])
    for ours, theirs in zip(found, reference_logits(folder), strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 0.1
