"""What the GPU kernels compile to, on a machine that may have no GPU.

    python -m perf.gpu_static [--model 8B] [--architecture 90] [--dump FOLDER]

Every kernel that a model's steps launch is compiled for sm_80 and sm_90. The table has registers a
thread, shared memory and occupancy of a multiprocessor, spilled bytes, and counts of the
instructions that decide its speed. Anything that spills, or lacks the instructions it is meant to
run on, fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.gpu.launch import Compiled

REGISTERS = 65536
SHARED = {80: 164 << 10, 90: 228 << 10}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
MAX_WARPS = 64
LEAST_WARPS = {
    "attention_kernel": 4,
    "matmul_kernel": 4,
    "float_row_kernel": 8,
    "digits_row_kernel": 8,
}
INSTRUCTIONS = ("HGMMA", "IGMMA", "HMMA", "IMMA", "LDGSTS", "LDG.128", "STG.128", "LDL", "STL")


@dataclass(frozen=True)
class Report:
    """One compiled kernel. `occupancy` is warps that a multiprocessor holds, of 64."""

    label: str
    architecture: int
    registers: int
    shared: int
    spilled: int
    occupancy: int
    instructions: dict[str, int]
    problems: list[str]


def compile_one(launch: Compiled, architecture: int) -> Report:
    """Compile for an architecture, and look at the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, kernel = launch.config, launch.config.kernel
    names = kernel.arg_names
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(names):
        signature[name] = launch.signature.get(name, "constexpr")
        if signature[name].startswith("*") or name in launch.aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    early = architecture >= 90
    constants = {**config.constants, "EARLY": early}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "launch_pdl": early}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = usage(compiled.asm["cubin"])
    counts = instructions(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32)
    by_shared = (SHARED[architecture] // max(shared + 1024, 1)) * config.warps
    warps = min(MAX_WARPS, by_registers // config.warps * config.warps, by_shared)
    report = Report(launch.label, architecture, registers, shared, spilled, warps, counts, [])
    report.problems.extend(judge(report, launch))
    return report


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack and local memory."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def instructions(cubin: bytes) -> dict[str, int]:
    """How often the instructions that matter occur in the machine code."""
    counts: Counter[str] = Counter()
    for line in _tool("nvdisasm", "-c", cubin).splitlines():
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", line)
        if found is None:
            continue
        name, *parts = found[1].split(".")
        if name in ("LDG", "STG") and "128" in parts:
            counts[f"{name}.128"] += 1
        counts[name] += 1
    return {name: counts[name] for name in INSTRUCTIONS if counts[name]}


def judge(report: Report, launch: Compiled) -> list[str]:
    """What is wrong with a kernel; empty if nothing."""
    counts, config = report.instructions, launch.config
    problems = []
    if report.spilled or counts.get("LDL") or counts.get("STL"):
        problems.append(f"spills {report.spilled} bytes")
    if report.shared > SHARED_LIMIT[report.architecture]:
        problems.append(f"takes {report.shared} bytes of shared memory")
    least = LEAST_WARPS.get(config.kernel.__name__, 16)
    if report.occupancy < least:
        problems.append(f"only {report.occupancy} warps fit a multiprocessor")
    missing = [w for w in _wanted(report, launch) if not any(counts.get(name) for name in w)]
    return problems + [f"has no {' or '.join(names)}" for names in missing]


def _wanted(report: Report, launch: Compiled) -> list[tuple[str, ...]]:
    """Instructions of which a kernel must have one each."""
    name, constants = launch.config.kernel.__name__, launch.config.constants
    hopper = report.architecture >= 90
    wide = ("LDG.128", "LDGSTS")
    if name == "attention_kernel":
        if hopper and not constants["DECODE"] and constants["BLOCK_M"] >= 64:
            return [("HGMMA",), wide]
        return [("HMMA", "HGMMA"), wide]
    if name == "matmul_kernel":
        if constants["FORMAT"] == "int8":
            return [("IGMMA",) if hopper else ("IMMA",), wide]
        return [("HGMMA",) if hopper else ("HMMA",), wide]
    return []


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton.backends.nvidia

    folder = Path(next(iter(triton.backends.nvidia.__path__))) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / name), option, file.name]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout


def table(reports: list[Report]) -> str:
    """Reports as lines of text."""
    lines = [f"{'kernel':34} {'sm':>3} {'regs':>4} {'shared':>7} {'spill':>5} {'warps':>5}  mix"]
    for r in reports:
        mix = " ".join(f"{name}:{count}" for name, count in r.instructions.items())
        line = f"{r.label:34} {r.architecture:3} {r.registers:4} {r.shared:7} {r.spilled:5}"
        wrong = f"  ! {'; '.join(r.problems)}" if r.problems else ""
        lines.append(f"{line} {r.occupancy:5}  {mix}{wrong}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, and say whether anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="", help="part of a model's name; all without")
    parser.add_argument("--architecture", type=int, action="append", choices=(80, 90))
    parser.add_argument("--json", type=Path, help="write the reports there")
    parser.add_argument("--kernel", default="", help="part of a kernel's label")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set; the compiler needs it unset")
    from kernels.backend import available_cores
    from kernels.gpu.catalogue import MODELS, launches

    wanted = [
        (launch, architecture)
        for model in MODELS
        if options.model in model.name
        for architecture in options.architecture or (80, 90)
        for launch in launches(model, hopper=architecture >= 90)
        if options.kernel in launch.label
    ]
    # The compilers run outside the interpreter's lock.
    with ThreadPoolExecutor(available_cores()) as threads:
        reports = list(threads.map(lambda each: compile_one(*each), wanted))
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1))
    wrong = sum(bool(r.problems) for r in reports)
    print(f"{len(reports)} compiled, {wrong} with problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
