"""What the runner asks of a device: place weights, hold the KV cache, compile and run a tape."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from kernels.batch import Batch, Samples, Sampling
from kernels.collectives import Collectives, Place, SharedMemory, join
from kernels.ops import DeltaHeads, Heads, Weight
from kernels.tape import Tape

DType = Literal["float32", "bfloat16"]
WeightFormat = Literal["auto", "float32", "bfloat16", "int8", "int4"]
CacheDType = Literal["float32", "bfloat16", "int8", "int4"]
# Parts of a weight that its name lists.
MOST_NAMES = 3
logger = logging.getLogger("ryzanstein.kernels")

TORCH_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_BITS: dict[CacheDType, int] = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


class HostTensor(Protocol):
    """A tensor of a checkpoint, still on the host and usually memory-mapped."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> str:
        """The stored format's name: `F32`, `F16`, `BF16`, or a ggml type such as `Q4_1`."""
        ...

    @property
    def block(self) -> int:
        """Values of a row that are stored together: columns are cut at multiples of it."""
        ...

    def narrow(self, dimension: int, start: int, length: int) -> HostTensor:
        """A part of it, as in `torch.narrow`; no more than the part is read later."""
        ...

    def dense(self) -> torch.Tensor:
        """The values as a float tensor (fp32, fp16 or bf16 as stored; fp32 if quantized)."""
        ...

    def packed(self) -> torch.Tensor:
        """Quantized blocks as stored: uint8 `[rows, bytes per row]`. Only for block formats."""
        ...


class TernaryTensor(HostTensor, Protocol):
    """A BitNet b1.58 matrix (format `TERNARY`): signs under one scale, times int8 activations."""

    @property
    def scale(self) -> float: ...

    def signs(self) -> torch.Tensor:
        """-1, 0 or 1, int8 `[out, in]`; the values are these times `scale`."""
        ...

    def narrow(self, dimension: int, start: int, length: int) -> TernaryTensor: ...


def stacked_name(parts: Sequence[HostTensor]) -> str:
    """What a weight of these parts is called."""
    if len(parts) <= MOST_NAMES:
        return "+".join(part.name for part in parts)
    return f"{parts[0].name}+{len(parts) - 1} more"


@dataclass(frozen=True)
class CacheLayout:
    """The shape of a paged KV cache: pages x page_size tokens x kv heads x head_dim a layer."""

    heads: tuple[Heads, ...]
    """Those of each layer that keeps keys and values."""
    page_size: int
    dtype: CacheDType
    max_context: int = 0
    """Positions that a sequence may reach."""
    delta: DeltaHeads | None = None
    """Those of layers that keep a state instead of keys and values."""
    delta_layers: int = 0
    sliding: frozenset[int] = frozenset()
    """Layers that see the last `window` positions only, and can have pages of their own."""
    window: int = 0
    latents_once: bool = False
    """Whether latents lie there once, not as keys and as values."""

    def vector_bytes(self, heads: Heads) -> int:
        """Bytes of one token's head, of keys or of values."""
        return heads.dim * CACHE_BITS[self.dtype] // 8

    def scale_bytes(self, heads: Heads) -> int:
        """Bytes of its scales: one fp32 with int8; two fp16 for each 32 values with int4."""
        return {"int8": 4, "int4": heads.dim // 8}.get(self.dtype, 0)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in all layers; 0 if there are none that keep one."""
        return self.delta_layers * self.delta.state_bytes if self.delta is not None else 0

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers, keys and values, with their scales."""
        return sum(map(self._page_bytes, self.heads))

    @property
    def bytes_per_window_page(self) -> int:
        """Those of them that belong to sliding layers."""
        return sum(self._page_bytes(self.heads[layer]) for layer in self.sliding)

    def _page_bytes(self, heads: Heads) -> int:
        vector = self.vector_bytes(heads) + self.scale_bytes(heads)
        parts = 1 if self.latents_once and heads.latent else 2
        return parts * self.page_size * heads.kv * vector


class Pages(Protocol):
    """The cache's pages as they are moved; `page_bytes` in all layers together."""

    page_bytes: int

    def copy(self, source: int, target: int) -> None:
        """One page to another."""
        ...

    def read(self, page: int, block: npt.NDArray[np.uint8]) -> None:
        """Fill `block`, uint8 `[page_bytes]`, with a page."""
        ...

    def write(self, block: npt.NDArray[np.uint8], page: int) -> None:
        """Make a page of what `read` left in `block`."""
        ...

    def discard(self, pages: Sequence[int]) -> None:
        """Give the memory of pages back to the system, where that can be done."""
        ...

    def populate(self, first: int, last: int) -> Iterator[None]:
        """Take the memory of pages [first, last), where that has to be, a piece an item taken."""
        ...


class States(Protocol):
    """The states of sequences, see `Batch`, as they are moved."""

    def copy(self, source: int, target: int) -> None:
        """One state to another's place."""
        ...


class PageCodec(Protocol):
    """Pages of the cache as blocks of bytes in another format, which loses what it cannot hold."""

    page_bytes: int

    def compress(self, page: int, block: npt.NDArray[np.uint8]) -> None:
        """Fill `block`, uint8 `[page_bytes]`, with a page of the cache."""
        ...

    def restore(self, block: npt.NDArray[np.uint8], page: int) -> None:
        """Make a page of the cache of what `compress` left in `block`."""
        ...


class Program(Protocol):
    """A compiled tape: `forward` and `sample` are separate, so that masks can come between."""

    def forward(self, batch: Batch) -> None:
        """Compute the logits of the batch's sampled rows and keep them."""
        ...

    def sample(self, sampling: Sampling) -> Samples:
        """Draw a token for each row of the kept logits."""
        ...

    def buffer_bytes(self, sampled_rows: int) -> int:
        """Bytes that activations and the logits of as many rows take."""
        ...

    def logits(self) -> torch.Tensor:
        """The kept logits, fp32 `[samples, vocab]` (for tests and quality measurements)."""
        ...


@runtime_checkable
class AheadProgram(Program, Protocol):
    """A program whose device runs behind: a step can be started while the one before it runs."""

    def start(
        self,
        batch: Batch,
        sampling_of: Callable[[], Sampling],
        fed: int,
        drawn: Sequence[int],
        slots: Sequence[int],
    ) -> Callable[[], Samples]:
        """Launch a step; what is returned waits for its tokens.

        `sampling_of` is called once the forward pass has been launched. The first `fed` rows take
        the token last drawn at their slot (`batch.table_rows`); what the logits rows `drawn` draw
        stays at `slots`.
        """
        ...


class WeightStore(Protocol):
    """Where a model's weights are placed, in one format."""

    def load(
        self,
        parts: Sequence[HostTensor],
        bias: Sequence[HostTensor] = (),
        *,
        bits: int = 4,
    ) -> Weight:
        """Place one weight, its parts stacked along the output dimension, with its bias. A format
        that rounds leaves it at least so many `bits`, on a GPU 4 or bfloat16's."""
        ...

    def column_unit(self, parts: Sequence[HostTensor]) -> int | None:
        """At multiples of how many columns a weight can be cut so that the pieces hold the numbers
        of the whole, and multiply what it would; None if its rows have to stay whole."""
        ...

    def loaded_bytes(self, *, shared: bool = False) -> int:
        """Bytes that the placed weights occupy; with `shared` also those that another store has
        placed just so, and that both use."""
        ...


class Backend(WeightStore, Protocol):
    """One device. `load` is called for every weight before `compile`."""

    name: str
    hardware: str
    """What it runs on, in a word."""
    collectives: Collectives | None
    """How it meets the other ranks, if there are any."""
    latents_once: bool
    """Whether its cache holds latents once, see `CacheLayout`."""

    def describe(self) -> str:
        """What computes: the same words mean the same numbers."""
        ...

    def other_weights(
        self, dtype: WeightFormat, packed_file: tuple[Path, str] | None = None
    ) -> WeightStore:
        """Room for the same weights in another format: tapes of either are compiled here, and share
        the cache. Raises ValueError if the device computes in one format only."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes of memory that the device has left; None if it is the host's memory."""
        ...

    def allocate_cache(
        self, layout: CacheLayout, pages: int, states: int = 0, window_pages: int = 0
    ) -> None:
        """Allocate the paged KV cache, and `states` if the layout has layers that keep some. On the
        host its memory is only taken as it is written. With `window_pages` sliding layers have so
        many of their own, see `Batch`."""
        ...

    def states(self) -> States:
        """The allocated states."""
        ...

    def pages(self, *, windowed: bool = False) -> Pages:
        """The allocated cache's pages, or its window pages."""
        ...

    def page_codec(self, dtype: CacheDType, *, windowed: bool = False) -> PageCodec:
        """Pages of the cache, or its window pages, in another format. Raises ValueError if there is
        no such codec."""
        ...

    def compile(self, tape: Tape, max_rows: int, max_sequences: int = 64) -> Program:
        """Make the tape runnable for steps of up to `max_rows` rows of `max_sequences` chunks."""
        ...

    def close(self) -> None:
        """Release what the device holds."""
        ...


def supports_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512_BF16 or AMX); without, fp32 is faster."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_identity() -> tuple[str, int, int]:
    """Changes when the kernels do: torch's version, the native module's size and time."""
    from kernels.cpu.native_backend import native_module

    native = native_module()
    if native is None or native.__file__ is None:
        return torch.__version__, 0, 0
    status = Path(native.__file__).stat()
    return torch.__version__, status.st_size, status.st_mtime_ns


def resolve_dtype(name: Literal["auto"] | DType) -> DType:
    """`auto` is bf16 where the CPU computes in it, else fp32."""
    if name == "auto":
        return "bfloat16" if supports_bfloat16() else "float32"
    return name


def select_backend(
    name: str,
    *,
    dtype: WeightFormat,
    cache_dtype: Literal["auto"] | CacheDType,
    threads: int,
    instructions: str = "auto",
    packed_file: tuple[Path, str] | None = None,
    batch_invariant: bool = False,
    place: Place | None = None,
) -> tuple[Backend, CacheDType]:
    """The named backend, and the dtype that its KV cache takes.

    `native` packs weights and is the fastest, `torch` computes in float32 or bfloat16, `reference`
    is the slow oracle; `triton` serves on an NVIDIA GPU. `auto` is `triton` where there is one,
    else `native` where this machine can, with a warning where it cannot.
    `threads` of 0 means one per core; `instructions` names the native kernels' instruction set.
    `packed_file` is where they keep packed weights for the next start, and what those are made of.
    `batch_invariant` is for the GPU, at a price; native results do not depend on the batch anyway.
    With a `place` this is one of several ranks, which meet here.
    Raises ValueError if the backend is unknown or cannot serve.
    """
    from kernels.cpu.native_backend import NativeBackend, unavailable_reason
    from kernels.cpu.packed_file import PackedFile
    from kernels.cpu.torch_ops import TorchCpuOps
    from kernels.reference import ReferenceOps
    from kernels.torch_backend import TorchBackend

    threads = threads or available_cores()
    if name == "triton" or (name == "auto" and torch.cuda.is_available()):
        found = _select_gpu(name, dtype, cache_dtype, batch_invariant, place)
        if found is not None:
            return found
    if name in ("auto", "native"):
        reason = unavailable_reason(instructions)
        if reason is None:
            # Its threads are its own; torch only samples, and must not compete.
            torch.set_num_threads(1)
            kv_dtype: CacheDType = "float32" if dtype == "float32" else "bfloat16"
            if cache_dtype != "auto":
                kv_dtype = cache_dtype
            packed = PackedFile(*packed_file) if packed_file is not None else None
            collectives = join(place, "cpu") if place is not None else None
            assert collectives is None or isinstance(collectives, SharedMemory)
            return NativeBackend(dtype, threads, instructions, packed, collectives), kv_dtype
        if name == "native" or instructions != "auto":
            raise ValueError(f"the native kernels cannot serve: {reason}")
        logger.warning(
            "the native kernels cannot serve: %s. The torch path does, several times slower.",
            reason,
        )
        name = "torch"
    families = {"torch": TorchCpuOps, "reference": ReferenceOps}
    if name not in families:
        known = ", ".join(["auto", "native", "triton", *families])
        raise ValueError(f"backend {name!r} is not known; choose one of {known}")
    for asked in (dtype, cache_dtype):
        if asked in ("int8", "int4"):
            raise ValueError(
                f"backend {name} does not compute in {asked}; only the native kernels do"
            )
    torch.set_num_threads(threads)
    dense = resolve_dtype(cast("Literal['auto'] | DType", dtype))
    collectives = join(place, "cpu") if place is not None else None
    backend = TorchBackend(name, families[name], dense, collectives)
    return backend, dense if cache_dtype == "auto" else cache_dtype


def _select_gpu(
    name: str,
    dtype: WeightFormat,
    cache_dtype: Literal["auto"] | CacheDType,
    batch_invariant: bool,
    place: Place | None,
) -> tuple[Backend, CacheDType] | None:
    """The GPU backend; None, with a warning, if it cannot serve and was not asked for by name."""
    from kernels.gpu_available import unavailable_reason

    reason = unavailable_reason()
    if reason is not None:
        if name == "triton":
            raise ValueError(f"the Triton kernels cannot serve: {reason}")
        logger.warning("this machine has a GPU that cannot serve: %s. The CPU does.", reason)
        return None
    from kernels.gpu.backend import GpuBackend

    computed: DType = "float32" if dtype == "float32" else "bfloat16"
    if place is not None:
        if place.ranks > torch.cuda.device_count():
            raise ValueError(
                f"execution.tensor_parallel is {place.ranks}, but there are "
                f"{torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(place.rank)
    device = torch.device("cuda", torch.cuda.current_device())
    collectives = join(place, "cuda") if place is not None else None
    backend = GpuBackend(
        dtype, computed, device, invariant=batch_invariant, collectives=collectives
    )
    return backend, computed if cache_dtype == "auto" else cache_dtype
