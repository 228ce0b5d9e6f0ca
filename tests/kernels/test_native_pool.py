"""Where the threads of the native pool run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from tests.engine.weights.test_gguf import write_gguf
from tests.kernels.native import chunks_batch, needs_native, program_of

pytestmark = needs_native
TASKS = Path("/proc/self/task")


def core_of(thread: int) -> int:
    """That it runs on, or ran on last."""
    return int((TASKS / str(thread) / "stat").read_text().rsplit(")", 1)[1].split()[36])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="with one core there is no other")
def test_a_worker_leaves_the_core_that_the_caller_is_on(tmp_path: Path) -> None:
    """The system would leave both there for a tick or more, while another core is free."""
    write_gguf(tmp_path / "model.gguf", kind=Type.Q4_1)
    program_of(tmp_path / "model.gguf", threads=1)  # whatever else starts threads has done so
    before = {int(task.name) for task in TASKS.iterdir()}
    program, _ = program_of(tmp_path / "model.gguf", threads=2)
    (worker,) = {int(task.name) for task in TASKS.iterdir()} - before
    batch = chunks_batch([[7] * 240], [0], np.arange(15)[None], 16)
    cores = os.sched_getaffinity(0)
    here = min(cores)

    def times_apart() -> int:
        apart = 0
        for _ in range(60):
            os.sched_setaffinity(worker, {here})
            time.sleep(0.001)  # asleep
            os.sched_setaffinity(worker, cores)
            program.forward(batch)
            apart += core_of(worker) != here
        return apart

    os.sched_setaffinity(0, {here})
    try:
        # By itself it was elsewhere in 3 to 17 of 20; other processes may keep it from coming.
        assert any(times_apart() >= 54 for _ in range(3))
    finally:
        os.sched_setaffinity(0, cores)
    time.sleep(0.01)  # if it is just going
    assert os.sched_getaffinity(worker) == cores
