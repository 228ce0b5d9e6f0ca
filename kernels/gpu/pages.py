"""Pages of the cache: copied on the device, or packed into one block of bytes on their way to it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(
    target, source, target_pages, source_pages, words, target_stride, source_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Page `source_pages[i]` to `target_pages[i]`; `words` of 8 bytes are a page's share of this
    tensor, the strides those between pages."""
    index = tl.program_id(0)
    to = tl.load(target_pages + index).to(tl.int64) * target_stride
    of = tl.load(source_pages + index).to(tl.int64) * source_stride
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < words
    tl.store(target + to + offsets, tl.load(source + of + offsets, mask=inside), mask=inside)
