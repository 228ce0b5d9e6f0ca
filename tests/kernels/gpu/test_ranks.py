"""Ranks on the GPU backend, in the interpreter: processes that meet over gloo in NCCL's place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.gpu.filled import program_of
from tests.kernels.gpu.test_program import logits_of
from tests.tiny import EXPERTS, OLMO, write_llama

ROOT = Path(__file__).parents[3]
RANK = """
import sys
from pathlib import Path
import torch
from kernels.collectives import Place, ProcessGroup
from tests import conftest
from tests.kernels.gpu import interpreter
from tests.kernels.gpu.filled import program_of
from tests.kernels.gpu.test_program import logits_of
model, rank, memory, weights, cache, out = sys.argv[1:]
interpreter.patch()
group = ProcessGroup(Place(int(rank), 2, int(memory)), "gloo")
program, _ = program_of(Path(model), weights=weights, cache=cache, collectives=group)
torch.save(logits_of(program), out)
"""


@pytest.mark.parametrize("family", [{}, EXPERTS, OLMO], ids=["dense", "experts", "olmo"])
@pytest.mark.parametrize(("weights", "cache"), [("float32", "float32")])
def test_two_ranks_give_one_ranks_logits(
    tmp_path: Path, weights: str, cache: str, family: dict[str, Any]
) -> None:
    model = write_llama(tmp_path / "model", **family)
    memory = os.memfd_create("store")
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, (model, rank, memory, weights, cache, out))],
            cwd=ROOT,
            pass_fds=(memory,),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        wanted = logits_of(program_of(model, weights=weights, cache=cache)[0])
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        os.close(memory)
    for out in outs:
        for ours, theirs in zip(torch.load(out), wanted, strict=True):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
