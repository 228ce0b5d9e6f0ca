"""Imports run downward only, and asyncio stays where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for top in ("engine", "kernels", "server") for p in (ROOT / top).rglob("*.py"))
LOOP_FILES = ("engine/engine.py", "engine/streams.py", "engine/execution/parallel.py")

# A room -> the rooms of this project that it may import from.
SHARED = ("engine.config", "engine.errors", "engine.types")
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels",),
    "engine.errors": (),
    "engine.config": SHARED,
    "engine.types": SHARED,
    "engine.text": (*SHARED, "engine.text"),
    "engine.scheduling": (*SHARED, "engine.scheduling"),
    "engine.weights": (*SHARED, "kernels", "engine.weights"),
    "engine.models": (*SHARED, "kernels", "engine.weights", "engine.models"),
    "engine.execution": (
        *SHARED,
        "kernels",
        "engine.scheduling",
        "engine.text",
        "engine.weights",
        "engine.models",
        "engine.execution",
    ),
    "engine.streams": SHARED,
    "engine": ("engine", "kernels"),
    "server": ("engine", "server"),
}
OURS = ("engine", "kernels", "server")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_downward(path: Path) -> None:
    name = module_name(path)
    room = max((r for r in ALLOWED if within(name, r)), key=len)
    for imported in imports(path):
        if imported.split(".")[0] in OURS:
            allowed = any(within(imported, r) for r in ALLOWED[room])
            assert allowed, f"{name} ({room}) imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_scheduling_has_no_torch_and_device_code_no_asyncio(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    roots = {i.split(".")[0] for i in imports(path)}
    if name.startswith("engine/scheduling"):
        assert "torch" not in roots
    if not name.startswith("server/") and name not in LOOP_FILES:
        assert not roots & {"asyncio", "anyio"}, name
    if name.startswith("engine/"):
        assert not roots & {"prometheus_client", "opentelemetry", "starlette"}, name


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_planning_stays_small() -> None:
    tree = ast.parse((ROOT / "engine/scheduling/scheduler.py").read_text())
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert max(lengths.values()) <= 60, lengths
