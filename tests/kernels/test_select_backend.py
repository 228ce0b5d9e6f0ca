"""Which backend serves, and what is said when the native kernels cannot."""

from __future__ import annotations

import logging
import platform
import shutil
from typing import Any

import pytest

from kernels import backend as backend_module
from kernels.backend import CacheDType, CacheLayout, select_backend
from kernels.cpu import native_backend
from kernels.cpu.native_backend import unavailable_reason
from kernels.ops import Heads
from tests.kernels.native import INSTRUCTION_SETS, needs_native


def choose(name: str, dtype: Any = "auto", cache: Any = "auto") -> tuple[str, str]:
    backend, kv_dtype = select_backend(name, dtype=dtype, cache_dtype=cache, threads=1)
    return backend.name, kv_dtype


@needs_native
def test_auto_takes_native_and_the_cache_follows_the_weights() -> None:
    assert choose("auto") == ("native", "bfloat16")
    assert choose("auto", "float32") == ("native", "float32")
    assert choose("auto", "int8", "int8") == ("native", "int8")
    assert choose("native", "float32", "bfloat16") == ("native", "bfloat16")
    assert choose("torch", "float32") == ("torch", "float32")


def test_torch_does_not_compute_in_int8() -> None:
    with pytest.raises(ValueError, match="backend torch does not compute in int8"):
        choose("torch", "int8")
    with pytest.raises(ValueError, match="backend reference does not compute in int8"):
        choose("reference", "float32", "int8")


@needs_native
def test_an_instruction_set_can_be_named() -> None:
    for name in INSTRUCTION_SETS:
        backend: Any = select_backend(
            "auto", dtype="auto", cache_dtype="auto", threads=1, instructions=name
        )[0]
        assert backend.instructions == name
    with pytest.raises(ValueError, match=r"'avx9' is not one that this CPU has: .*avx2"):
        select_backend("auto", dtype="auto", cache_dtype="auto", threads=1, instructions="avx9")


def test_a_page_counts_its_scales() -> None:
    dtypes: list[CacheDType] = ["float32", "bfloat16", "int8", "int4"]
    layouts = [CacheLayout((Heads(4, 2, 64),) * 2, 16, dtype) for dtype in dtypes]
    pages = [layout.bytes_per_page for layout in layouts]
    assert pages == [32768, 16384, 8192 + 512, 4096 + 1024]


def test_without_native_kernels_torch_serves_and_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_backend, "native_module", lambda: None)
    with caplog.at_level(logging.WARNING, backend_module.logger.name):
        assert choose("auto")[0] == "torch"
    assert "not built" in caplog.text
    assert "several times slower" in caplog.text
    with pytest.raises(ValueError, match="cannot serve: they were not built"):
        choose("native")


def test_a_cpu_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        @staticmethod
        def instruction_sets() -> list[str]:
            return []

    monkeypatch.setattr(native_backend, "native_module", lambda: Old)
    assert unavailable_reason() == "this CPU lacks AVX2 with FMA and F16C"


@pytest.mark.skipif(
    shutil.which("c++") is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="the kernels are built with a C++ compiler on x86-64 Linux",
)
def test_where_there_is_a_compiler_the_kernels_are_built() -> None:
    """A build that fails only leaves them out, so that the installation succeeds."""
    assert native_backend.native_module() is not None


def test_a_missing_extension_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(native_backend.importlib, "import_module", missing)
    assert native_backend.native_module() is None
