"""Pages of a cache on a device: copied there, and as one block of bytes on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kernels.gpu.fused import whole_steps
from kernels.gpu.launch import Config, enter, power_of_two
from kernels.host_pages import spans_of

Bytes = npt.NDArray[np.uint8]


class GpuPages:
    """Each of `tensors` has the keys and values of some layers one behind the other, or their
    scales: `[2 * layers, slots, ...]`; a page is an equal share of the slots of each. On the host
    it is a block of bytes that is sent at once."""

    def __init__(self, tensors: Sequence[torch.Tensor], pages: int) -> None:
        self._parts = [tensor.view(len(tensor), pages, -1).view(torch.uint8) for tensor in tensors]
        sizes = [len(part) * part.shape[2] for part in self._parts]
        self._spans, self.page_bytes = spans_of(sizes)

    def copy(self, source: int, target: int) -> None:
        """One page to another, in every layer."""
        for part in self._parts:
            part[:, target] = part[:, source]

    def read(self, page: int, block: Bytes) -> None:
        """Fill `block`, uint8 `[page_bytes]`."""
        for part, span in zip(self._parts, self._spans, strict=True):
            block[span] = part[:, page].cpu().numpy().reshape(-1)

    def write(self, block: Bytes, page: int) -> None:
        """Make a page of what `read` left in `block`."""
        for part, span in zip(self._parts, self._spans, strict=True):
            part[:, page] = torch.from_numpy(block[span]).to(part.device).view(len(part), -1)

    def discard(self, pages: Sequence[int]) -> None:
        """Nothing: the device's memory is the cache's alone."""

    def populate(self, first: int, last: int) -> Iterator[None]:
        """Nothing: all of it is there."""
        return iter(())


@triton.jit(do_not_specialize=["page", "pages"])
def compress_kernel(
    numbers,
    steps,
    cache,
    page,
    pages,
    VECTORS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A vector of a page, fp32 or bf16, as int8 with a step of its own."""
    enter(EARLY)
    vector, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    source = cache + ((layer * pages + page) * VECTORS + vector) * DIM + dims
    x = tl.load(source, mask=dims < DIM, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 0)
    place = layer * VECTORS + vector
    tl.store(steps + place, most / 127.0)
    number = whole_steps(x, most).to(tl.int8)
    tl.store(numbers + place * DIM + dims, number, mask=dims < DIM)


@triton.jit(do_not_specialize=["page", "pages"])
def restore_kernel(
    numbers,
    steps,
    cache,
    page,
    pages,
    VECTORS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The reverse of `compress_kernel`, as far as there is one."""
    enter(EARLY)
    vector, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    place = layer * VECTORS + vector
    number = tl.load(numbers + place * DIM + dims, mask=dims < DIM, other=0).to(tl.float32)
    target = cache + ((layer * pages + page) * VECTORS + vector) * DIM + dims
    value = number * tl.load(steps + place)
    tl.store(target, value.to(cache.dtype.element_ty), mask=dims < DIM)


class GpuCodec:
    """Pages of a float cache, some `[2 * layers, slots, kv heads, head_dim]`, as int8 with a scale
    for each token and head; they are made so on the device, before they are sent."""

    def __init__(self, caches: Sequence[torch.Tensor], pages: int, device: torch.device) -> None:
        self._pages = pages
        counts = [len(cache) * cache.shape[1] // pages * cache.shape[2] for cache in caches]
        sizes = [count * cache.shape[3] for count, cache in zip(counts, caches, strict=True)]
        self.page_bytes = 4 * sum(counts) + sum(sizes)
        self._block = torch.empty(self.page_bytes, dtype=torch.uint8, device=device)
        # The steps come first: they have to lie at multiples of 4.
        steps = self._block[: 4 * sum(counts)].view(torch.float32)
        numbers = self._block[4 * sum(counts) :].view(torch.int8)
        self._parts = list(
            zip(torch.split(numbers, sizes), torch.split(steps, counts), caches, strict=True)
        )
        self._launch(compress_kernel, pages - 1)  # compiled now, not with the first page
        self._launch(restore_kernel, pages - 1)

    def compress(self, page: int, block: Bytes) -> None:
        """Fill `block`, uint8 `[page_bytes]`, with a page of the cache."""
        self._launch(compress_kernel, page)
        block[:] = self._block.cpu().numpy()

    def restore(self, block: Bytes, page: int) -> None:
        """Make a page of the cache of what `compress` left in `block`."""
        self._block.copy_(torch.from_numpy(block))
        self._launch(restore_kernel, page)

    def _launch(self, kernel: object, page: int) -> None:
        if self._block.is_cuda:
            torch.cuda.set_device(self._block.device)  # a thread starts with the first
        for numbers, steps, cache in self._parts:
            layers, slots, heads, dim = cache.shape
            vectors = slots // self._pages * heads
            sizes = {"VECTORS": vectors, "DIM": dim, "BLOCK": power_of_two(dim)}
            config = Config(kernel, sizes, 1)
            config.launch((vectors, layers), numbers, steps, cache, page, self._pages)
