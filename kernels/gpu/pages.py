"""Pages of a cache on a device: copied there, or as one block of bytes on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kernels.gpu.launch import Config, enter, power_of_two
from kernels.host_pages import spans_of


@triton.jit
def copy_kernel(
    target, source, target_pages, source_pages, words, target_stride, source_stride,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Page `source_pages[i]` to `target_pages[i]`; `words` of 8 bytes are a page's share of this
    tensor, the strides those between pages."""
    enter(EARLY)
    index = tl.program_id(0)
    to = tl.load(target_pages + index).to(tl.int64) * target_stride
    of = tl.load(source_pages + index).to(tl.int64) * source_stride
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < words
    tl.store(target + to + offsets, tl.load(source + of + offsets, mask=inside), mask=inside)


class GpuPages:
    """Pages of a cache on a device: copied there, or to and from blocks of bytes on the host.

    `tensors` begin with the cache's slots; a page is an equal share of each, in order.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], pages: int) -> None:
        flat = [tensor.view(-1).view(torch.uint8).view(pages, -1) for tensor in tensors]
        self._parts = [part.view(torch.int64) for part in flat]
        self._spans, self.page_bytes = spans_of([part.shape[1] for part in flat])
        self._device = tensors[0].device
        self._on_gpu = self._device.type == "cuda"

    def copy(self, source: int, target: int) -> None:
        """One page to another, in every tensor."""
        if self._on_gpu:
            torch.cuda.set_device(self._device)  # a thread starts with the first
        ends = torch.tensor([target, source], dtype=torch.int32, device=self._device)
        for part in self._parts:
            words = part.shape[1]
            block = min(1024, power_of_two(words))
            Config(copy_kernel, {"BLOCK": block}).launch(
                (1, -(-words // block)), part, part, ends[:1], ends[1:], words, words, words
            )

    def read(self, page: int, block: npt.NDArray[np.uint8]) -> None:
        """Fill `block`, uint8 `[page_bytes]`."""
        for part, span in zip(self._parts, self._spans, strict=True):
            block[span] = part[page].view(torch.uint8).cpu().numpy()

    def write(self, block: npt.NDArray[np.uint8], page: int) -> None:
        """Make a page of what `read` left in `block`."""
        for part, span in zip(self._parts, self._spans, strict=True):
            part[page].view(torch.uint8).copy_(torch.from_numpy(block[span]))

    def discard(self, pages: Sequence[int]) -> None:
        """Nothing: the device's memory is the cache's alone."""
