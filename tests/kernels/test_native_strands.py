"""Steps whose sequences are shared out among threads, each taking its own through the layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from kernels.batch import Batch
from kernels.cpu.native_program import NativeProgram
from tests.engine.weights.test_gguf import write_gguf
from tests.kernels.native import chunks_batch, needs_native, program_of
from tests.tiny import OLMO, write_llama

pytestmark = needs_native
SIZE, PAGES = 16, 100  # tokens a page, pages a sequence may have: 4


def model(folder: Path) -> Path:
    write_gguf(folder / "model.gguf", kind=Type.Q4_1)
    return folder / "model.gguf"


class Company:
    """Sequences that two programs take through the same steps, one of them with a single thread."""

    def __init__(self, path: Path, sequences: int, threads: int, **settings: Any) -> None:
        self._random = np.random.default_rng(sequences)
        self._tables = self._random.permutation(PAGES)[: sequences * 4].reshape(sequences, 4)
        self._lengths = [0] * sequences
        self.program = program_of(path, threads=threads, pages=PAGES, **settings)[0]
        self._alone = program_of(path, threads=1, pages=PAGES, **settings)[0]

    def step(self, counts: list[int]) -> None:
        """So many tokens of each sequence; all logits have to be the same, bit for bit."""
        chosen = [n for n, count in enumerate(counts) if count]
        tokens = [self._random.integers(0, 260, counts[n]).tolist() for n in chosen]
        starts = [self._lengths[n] for n in chosen]
        batch = chunks_batch(tokens, starts, self._tables[chosen], SIZE)
        for program in (self.program, self._alone):
            program.forward(batch)
        assert torch.equal(self.program.logits(), self._alone.logits())
        for n in chosen:
            self._lengths[n] += counts[n]


def test_norms_over_all_heads_are_shared_out_alike(tmp_path: Path) -> None:
    company = Company(write_llama(tmp_path, **OLMO), 16, 2)
    company.step([9] * 16)
    company.step([1] * 15 + [16])
    assert company.program.strands == 2


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_shares_of_two_threads_give_the_bits_of_one(tmp_path: Path, cache: str) -> None:
    company = Company(model(tmp_path), 16, 2, cache=cache)
    company.step([9] * 16)
    for _ in range(10):
        company.step([1] * 16)
        assert company.program.strands == 2
    company.step([1] * 15 + [16])
    company.step([0, 1, 1, 8, 5] + [1] * 8 + [3, 0, 2])
    assert company.program.strands == 2


def test_three_threads_share_as_well(tmp_path: Path) -> None:
    company = Company(model(tmp_path), 24, 3)
    company.step([3] * 24)
    assert company.program.strands == 3
    company.step([2] * 12 + [5] * 12)
    assert company.program.strands == 3


def test_windows_and_float_weights_are_shared_out_alike(tmp_path: Path) -> None:
    path = write_llama(tmp_path, model_type="mistral", sliding_window=20)
    company = Company(path, 16, 2, weights="bfloat16")
    company.step([2] * 16)
    for _ in range(3):
        company.step([1, 10] * 8)
        assert company.program.strands == 2


@pytest.mark.parametrize(
    "counts", [[1] * 11, [40], [1, 30], [1] * 4 + [40]], ids=["few", "one", "two", "unequal"]
)
def test_steps_that_cannot_be_shared_evenly_are_shared_by_ops(
    tmp_path: Path, counts: list[int]
) -> None:
    company = Company(model(tmp_path), len(counts), 2)
    company.step(counts)
    assert company.program.strands == 0


def of_one_sequence(program: NativeProgram, batch: Batch) -> torch.Tensor:
    program.forward(replace(batch, table_rows=np.zeros_like(batch.table_rows)))
    return program.logits().clone()


def test_chunks_of_one_sequence_stay_together(tmp_path: Path) -> None:
    """The second reads what the first writes in the same step."""
    path = model(tmp_path)
    table = np.arange(4)[None].repeat(2, axis=0)
    tokens = np.random.default_rng(3).integers(0, 260, 20).tolist()
    batch = chunks_batch([tokens[:10], tokens[10:]], [0, 10], table, SIZE)
    program, alone = program_of(path, threads=2)[0], program_of(path, threads=1)[0]
    assert torch.equal(of_one_sequence(program, batch), of_one_sequence(alone, batch))
    assert program.strands == 0


def test_a_profile_times_ops_one_by_one(tmp_path: Path) -> None:
    company = Company(model(tmp_path), 16, 2)
    company.program.profile(True)
    company.step([1] * 16)
    assert company.program.strands == 0
    assert company.program.nanoseconds()["linear"] > 0
    company.program.profile(False)
    company.step([1] * 16)
    assert company.program.strands == 2
