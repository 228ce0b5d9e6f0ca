"""What a model's linears are given, seen on the way through a text.

The model runs as always, on ops that look at what they multiply: its code need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from engine.execution.memory import available_memory
from engine.models import load_model
from engine.weights.checkpoint import Checkpoint
from kernels.backend import CacheLayout, DType
from kernels.batch import Batch
from kernels.cpu.torch_ops import TorchCpuOps
from kernels.ops import Recorder, Tape, Weight
from kernels.torch_backend import TorchBackend

PAGE = 16
# Products of inputs that are held at a time; a model whose linears need more is run through again.
PRODUCT_BYTES = 4 << 30


class Products:
    """The sum of x^T x over all inputs x of the linears that are `wanted`, fp32 `[in, in]`."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()
        self.sums: dict[str, torch.Tensor] = {}

    def see(self, x: torch.Tensor, weight: Weight) -> None:
        """Add a linear's inputs `[rows, in]`."""
        if weight.name in self.wanted:
            product = x.float().T @ x.float()
            if weight.name in self.sums:
                self.sums[weight.name] += product
            else:
                self.sums[weight.name] = product


def _dtype(checkpoint: Checkpoint) -> DType:
    """float32, or bfloat16 for models of which float32 would fill more than half of the memory."""
    values = sum(math.prod(checkpoint.tensor(name).shape) for name in checkpoint.names())
    free = available_memory()
    return "bfloat16" if free is not None and 4 * values > free // 2 else "float32"


class Calibration:
    """A float model, and texts to run through it."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Callable[[], None]
    ) -> None:
        products = Products()

        class SeeingOps(TorchCpuOps):
            def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
                products.see(x, weight)
                return super().linear(x, weight)

        self._products, self._windows, self._progress = products, windows, progress
        backend = TorchBackend("torch", SeeingOps, _dtype(checkpoint))
        model = load_model(checkpoint, backend)
        longest = max(map(len, windows))
        pages = -(-longest // PAGE)
        layout = CacheLayout(model.config.layers, model.config.heads, PAGE, "float32", longest)
        backend.allocate_cache(layout, pages)
        recorder = Recorder()
        tape = recorder.finish(model.forward(recorder))
        *instructions, head = tape.instructions
        # What the head would say is not asked for, and is most of a small model's work.
        tape = Tape(tuple(instructions), head.arguments[0], tape.last_use[:-1])
        self._pages = pages
        self._program = backend.compile(tape, longest)
        self.linears: dict[str, int] = {
            i.arguments[1].name: i.arguments[1].shape[1]
            for i in tape.instructions
            if i.op == "linear"
        }
        """Every linear's name and number of inputs, in the order in which they run."""

    def products(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """x^T x of these linears over all windows."""
        self._products.wanted, self._products.sums = set(names), {}
        for window in self._windows:
            self._program.forward(self._batch(window))
            self._progress()
        return self._products.sums

    def _batch(self, window: Sequence[int]) -> Batch:
        """A prompt of its own; all rows go through the last layer."""
        count = len(window)
        rows = np.arange(count)
        return Batch(
            token_ids=np.array(window, np.int64),
            positions=rows,
            kv_slots=rows,
            query_starts=np.array([0, count], np.int32),
            context_lengths=np.array([count], np.int32),
            table_rows=np.zeros(1, np.int32),
            page_table=np.arange(self._pages, dtype=np.int32)[None],
            sample_rows=rows,
        )


def products_of(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    wanted: Callable[[str, int], bool],
    progress: Callable[[str, int, int], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices by name, and x^T x of their inputs over all windows; of those that are `wanted` for
    their name and number of inputs."""
    done, passes = 0, 1

    def seen() -> None:
        nonlocal done
        done += 1
        progress("calibrate", done, len(windows) * passes)

    calibration = Calibration(checkpoint, windows, seen)
    # A linear's name is those of the matrices that are stacked in it.
    linears = {
        name: inputs
        for name, inputs in calibration.linears.items()
        if all(wanted(part, inputs) for part in name.split("+"))
    }
    rounds = list(_rounds(linears))
    passes = len(rounds)
    for names in rounds:
        for name, products in calibration.products(names).items():
            for part in name.split("+"):
                yield part, products


def _rounds(linears: dict[str, int]) -> Iterator[list[str]]:
    """Linears whose products are held at the same time."""
    names: list[str] = []
    size = 0
    for name, inputs in linears.items():
        if names and size + 4 * inputs**2 > PRODUCT_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * inputs**2
    if names:
        yield names
