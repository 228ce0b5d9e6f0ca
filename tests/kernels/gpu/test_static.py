"""What the kernels compile to for sm_80 and sm_90, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.gpu import (
    attention,
    digits,
    experts,
    fused,
    latent,
    matmul,
    pages,
    pointwise,
    recurrence,
    sampling,
    single,
)
from kernels.gpu.catalogue import LLAMA_8B, launches

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("architecture", "kernel", "least"),
    [(90, "", 70), (80, "matmul", 15), (80, "attention", 8), (80, "row group4", 10)],
)
def test_every_launch_compiles_to_what_it_is_meant_to_run_on(
    tmp_path: Path, architecture: int, kernel: str, least: int
) -> None:
    """In a process of its own, since the interpreter is on in this one."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "perf.gpu_static", "--model", "8B", "--json", str(report)]
    command += ["--architecture", str(architecture), "--kernel", kernel]
    # Coverage, which would take a quarter of the time, does not follow it either.
    left_out = ("TRITON_INTERPRET", "COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads(report.read_text())
    assert len(kernels) >= least
    assert all(k["spilled"] == 0 and not k["problems"] for k in kernels)


def test_the_catalogue_has_every_kernel() -> None:
    modules = (
        attention, digits, experts, fused, latent, matmul, pages, pointwise, recurrence, sampling,
        single,
    )  # fmt: skip
    kernels = {name for m in modules for name in vars(m) if name.endswith("_kernel")}
    assert {one.config.kernel.__name__ for one in launches(LLAMA_8B)} == kernels


def test_a_kernel_that_spills_or_misses_its_instructions_is_a_problem() -> None:
    from perf.gpu_static import Report, judge

    launch = next(one for one in launches(LLAMA_8B) if one.label == "attention mixed bf16 64")
    good = {"HGMMA": 12, "LDGSTS": 38}
    report = Report(launch.label, 90, 200, 80000, 0, 8, good, [])
    assert judge(report, launch) == []
    bad = Report(launch.label, 90, 200, 240000, 64, 2, {"HMMA": 12, "LDL": 3}, [])
    found = " ".join(judge(bad, launch))
    for words in ("spills 64", "240000 bytes", "only 2 warps", "no HGMMA", "no LDG.128 or LDGSTS"):
        assert words in found
