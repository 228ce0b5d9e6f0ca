"""Nothing is compiled once the engine is ready: what steps launch was launched before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.batch import Penalty
from kernels.gpu.launch import Config
from kernels.gpu.program import Graphs
from tests.kernels.gpu.filled import program_of
from tests.kernels.native import chunks_batch
from tests.kernels.test_sampling import options
from tests.tiny import EXPERTS, OLMO, write_llama


def specialization(config: Config, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles anew for: constants, types, alignment, and integers that are 1 or
    multiples of 16 unless a kernel asks that they are not looked at."""
    names = [n for n in config.kernel.arg_names if n not in config.constants and n != "EARLY"]
    ignored = config.kernel.kwargs.get("do_not_specialize") or ()
    kinds: list[Any] = []
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            kinds.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            kinds.append("int" if name in ignored else (value == 1, value % 16 == 0))
        else:
            kinds.append(type(value))
    constants = tuple(sorted((k, str(v)) for k, v in config.constants.items()))
    return (config.kernel.__name__, constants, tuple(kinds), config.warps, config.stages)


@pytest.mark.parametrize(
    ("weights", "family"),
    [
        ("bfloat16", {}),
        ("int8", {}),
        ("int4", {}),
        ("bfloat16", EXPERTS),
        ("int8", EXPERTS),
        ("bfloat16", OLMO),
    ],
)
def test_no_step_launches_what_was_not_compiled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, family: dict[str, Any]
) -> None:
    launched: set[tuple[Any, ...]] = set()

    def launch(self: Config, grid: tuple[int, ...], *arguments: Any) -> None:
        assert all(size > 0 for size in grid)
        launched.add(specialization(self, arguments))

    monkeypatch.setattr(Config, "launch", launch)

    def prepare_all(self: Graphs, launches: dict[Any, Callable[[], None]]) -> None:
        for run in launches.values():
            run()

    monkeypatch.setattr(Graphs, "prepare_all", prepare_all)
    program, backend = program_of(
        write_llama(tmp_path, **family), weights=weights, cache="bfloat16", rows=40, sequences=20
    )
    ready = set(launched)
    assert len(ready) > 20
    rng = np.random.default_rng(0)
    tables = np.arange(20 * 6).reshape(20, 6).astype(np.int32)
    for count in range(1, 21):
        chunk = max(1, min(40 // count, 9))
        for sizes in ([1] * count, [chunk] * count, [1] * (count - 1) + [chunk]):
            tokens = [rng.integers(0, 260, size).tolist() for size in sizes]
            program.forward(chunks_batch(tokens, [3] * count, tables, 4))
            program.sample(options(count, top_p=0.5))
            rows = len(program.logits())
            edited = options(rows, temperature=0)
            counts = np.zeros(260, np.int32)
            edited.penalties = [Penalty(row, counts, counts > 0) for row in range(0, rows, 2)]
            program.sample(edited)
    backend.pages().copy(3, 5)
    assert launched == ready
