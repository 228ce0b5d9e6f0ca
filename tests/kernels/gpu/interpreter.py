"""Triton's interpreter, made to compute in bf16 as a GPU does.

As it comes it multiplies bf16 matrices as if their bits were integers, and cuts instead of
rounding. Here both go through fp32, with rounding to nearest, ties to even.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tests.untraced import untraced

Array = np.ndarray[Any, Any]


def widen(bits: Array) -> Array:
    """bf16 bits, uint16, as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """fp32 rounded to bf16 bits, uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded >> np.uint32(16)).astype(np.uint16)


def patch() -> None:
    """Replace the two operations, and what takes most time; once."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_bf16", False):
        return
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, src, dst_type)
        data = widen(src.data) if source == tl.bfloat16 else src.data.astype(np.float32)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(narrow(data), target)
        return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a = interpreter.TensorHandle(widen(a.data), tl.float32)
            b = interpreter.TensorHandle(widen(b.data), tl.float32)
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = lambda self, src, dst, mode: self.cast_impl(src, dst)
    builder.computes_bf16 = True
    launch, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        # It goes through the whole language for each function that a kernel calls, and only what
        # the kernel itself has patched is ever restored.
        languages = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch_lang(function)

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            with untraced():
                return launch(self, *arguments, **options)
        finally:
            patched.discard(id(tl))

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run
    # Its own checks of every addition take half the time.
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
