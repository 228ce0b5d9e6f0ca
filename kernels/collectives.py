"""How the ranks of one model meet: sums and gathers of activations that each has a part of.

On the CPU the ranks share memory, mapped from a file descriptor without a name, so nothing can be
left behind; where the native module was not built, gloo takes its place. GPUs use NCCL. On the CPU
sums run in the order of the ranks, so every rank and every run gets the same bits.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

# What the native module says where another rank called `abort`.
GIVEN_UP = "another rank has given up"
# What a rank passes on at a time: stays in a core's cache, and holds a row of logits.
SLOT_BYTES = 4 << 20


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and the descriptor of the memory by which they meet."""

    rank: int
    ranks: int
    memory: int


class Collectives(Protocol):
    """Operations that all ranks call together, in the same order, with the same rows."""

    rank: int
    ranks: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' `x`, all of one shape and dtype."""
        ...

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """The ranks' `x` side by side: `[rows, widths[rank]] -> [rows, sum(widths)]`."""
        ...

    def abort(self) -> None:
        """Make the others give up waiting for this rank, where that can be done."""
        ...


class SharedMemory:
    """Collectives through memory that the ranks of one machine map. Activations are fp32."""

    def __init__(self, place: Place, native: Any) -> None:
        self.rank, self.ranks = place.rank, place.ranks
        # Whoever comes first makes it as large; the others change nothing.
        os.ftruncate(place.memory, native.Exchange.bytes(place.ranks, SLOT_BYTES))
        self.exchange = native.Exchange(place.memory, place.rank, place.ranks, SLOT_BYTES)
        self._device = native.Device(native.instruction_sets()[0], 1)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, width = x.shape
        self.exchange.sum(self._device, x.data_ptr(), rows, width, out.data_ptr())
        return out

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        x, out = x.contiguous(), torch.empty(len(x), sum(widths))
        self.exchange.gather(self._device, x.data_ptr(), len(x), list(widths), out.data_ptr())
        return out

    def abort(self) -> None:
        self.exchange.abort()


class ProcessGroup:
    """Collectives of torch.distributed: `nccl` between GPUs, `gloo` elsewhere."""

    def __init__(self, place: Place, backend: Literal["nccl", "gloo"]) -> None:
        self.rank, self.ranks = place.rank, place.ranks
        self._ordered = backend == "gloo"
        # The ranks find each other through the shared descriptor: no port, and no file to remove.
        store = dist.FileStore(  # type: ignore[attr-defined]
            f"/proc/self/fd/{place.memory}", place.ranks
        )
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks)
        if self._ordered:
            # Its threads have to end before the libraries do, or the process aborts as it exits.
            atexit.register(dist.destroy_process_group)
        # Its buffers are taken now, so that whoever counts free memory counts them, too.
        device = "cuda" if backend == "nccl" else "cpu"
        dist.all_reduce(torch.zeros(1, device=device))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if not self._ordered:
            dist.all_reduce(x)
            return x
        total, *others = self._parts(x, [x.shape[1]] * self.ranks)
        for part in others:
            total += part
        return total

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return torch.cat(self._parts(x, widths), dim=1)

    def abort(self) -> None:
        # Its operations end with the processes, which whoever started them sees to.
        pass

    def _parts(self, x: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's `x`. Parts travel at the width of the widest, which all libraries take."""
        widest = max(widths)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous()
        whole = torch.empty(self.ranks, len(x), widest, dtype=x.dtype, device=x.device)
        dist.all_gather(list(whole), padded)
        return [part[:, :width] for part, width in zip(whole, widths, strict=True)]


def join(place: Place, device: Literal["cpu", "cuda"]) -> Collectives:
    """Meet the other ranks; returns when all are there, or at once with shared memory."""
    from kernels.cpu.native_backend import native_module

    if device == "cuda":
        return ProcessGroup(place, "nccl")
    native = native_module()
    if native is not None and native.instruction_sets():
        return SharedMemory(place, native)
    return ProcessGroup(place, "gloo")


def shared_memory() -> int:
    """A descriptor of memory for ranks to meet in; close it when they have it."""
    return os.memfd_create("ryzanstein-ranks")
