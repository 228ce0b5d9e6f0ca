"""What a model's linears are given, seen on the way through a text.

The model runs as always, on ops that look at what they multiply: its code need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from engine.compression.fit import Inputs
from engine.errors import ConfigError
from engine.execution.memory import available_memory
from engine.models import load_model
from engine.weights.checkpoint import Checkpoint
from kernels.backend import TORCH_DTYPES, CacheLayout, DType
from kernels.batch import Batch
from kernels.cpu.torch_ops import TorchCpuOps
from kernels.ops import Recorder, Tape, Weight
from kernels.reference import tensor_of
from kernels.torch_backend import TorchBackend

PAGE = 16
# Of the memory beside the weights, what products of inputs may take; a model whose linears need
# more is run through again.
PRODUCT_SHARE = 1 / 3
# Matrices as large as the widest linear's products that fitting one takes.
FITTING = 5


def _dtype(checkpoint: Checkpoint) -> DType:
    """In which the weights are kept: as they are stored, if that is bfloat16."""
    formats = {checkpoint.tensor(name).format for name in checkpoint.names()}
    return "bfloat16" if "BF16" in formats else "float32"


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


class Calibration:
    """A float model, and texts to run through it."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Callable[[], None]
    ) -> None:
        products = Products()

        class SeeingOps(TorchCpuOps):
            def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
                products.see(x, weight)
                placed = tensor_of(weight)
                # One at a time: processors without bfloat16 products are ten times slower in them.
                bias = None if placed.bias is None else placed.bias.float()
                return torch.nn.functional.linear(x, placed.tensor.float(), bias)

        self._products, self._windows, self._progress = products, windows, progress
        self._backend = TorchBackend("torch", SeeingOps, _dtype(checkpoint))
        model = load_model(checkpoint, self._backend)
        longest = max(map(len, windows))
        self._pages, self._longest = -(-longest // PAGE), longest
        layout = CacheLayout(model.config.layers, model.config.heads, PAGE, "float32", longest)
        self._backend.allocate_cache(layout, self._pages)
        recorder = Recorder()
        self._tape = recorder.finish(model.forward(recorder))
        # What the head would say is not asked for.
        self.linears: dict[str, int] = {
            i.arguments[1].name: i.arguments[1].shape[1]
            for i in self._tape.instructions[:-1]
            if i.op == "linear"
        }
        """Every linear's name and number of inputs, in the order in which they run."""

    def products(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """x^T x of these linears over all windows."""
        self._products.wanted, self._products.sums = set(names), {}
        program = self._backend.compile(self._until(names[-1]), self._longest)
        for window in self._windows:
            program.forward(self._batch(window))
            self._progress()
        found, self._products.sums = self._products.sums, {}
        return found

    def _until(self, name: str) -> Tape:
        """The tape up to this linear."""
        tape = self._tape
        last = next(
            number
            for number, i in enumerate(tape.instructions)
            if i.op == "linear" and i.arguments[1].name == name
        )
        instructions = tape.instructions[: last + 1]
        return Tape(instructions, instructions[-1].results[0], tape.last_use[: last + 1])

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
) -> Iterator[tuple[str, Inputs]]:
    """Matrices by name, and what their inputs are over all windows; of those that are `wanted` for
    their name and number of inputs. Raises ConfigError if there are too few tokens, or too little
    memory."""
    done, passes = 0, 1
    rows = sum(map(len, windows))

    def seen() -> None:
        nonlocal done
        done += 1
        progress("calibrate", done, len(windows) * passes)

    room = _room(checkpoint)
    calibration = Calibration(checkpoint, windows, seen)
    # A linear's name is those of the matrices that are stacked in it.
    linears = {
        name: inputs
        for name, inputs in calibration.linears.items()
        if all(wanted(part, inputs) for part in name.split("+"))
    }
    widest = max(linears.values(), default=0)
    if rows < widest:
        raise ConfigError(
            f"the text gives {rows} tokens, but what {widest} inputs of a layer have to do with "
            f"each other takes at least as many, better {4 * widest}; give a longer one"
        )
    rounds = list(_rounds(linears, room))
    passes = len(rounds)
    for names in rounds:
        for name, products in calibration.products(names).items():
            inputs = Inputs(products, rows)
            for part in name.split("+"):
                yield part, inputs


def _room(checkpoint: Checkpoint) -> int:
    """Bytes that products may take. Raises ConfigError if the model alone does not fit."""
    free = available_memory()
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    size = TORCH_DTYPES[_dtype(checkpoint)].itemsize
    weights = sum(math.prod(tensor.shape) for tensor in tensors) * size
    widest = max((tensor.shape[1] for tensor in tensors if len(tensor.shape) > 1), default=0)
    needed = weights + FITTING * 4 * widest**2
    if free is not None and needed > free:
        raise ConfigError(
            f"calibrating takes about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are "
            "free; without a text it takes little"
        )
    return int(((free or 2 * needed) - weights) * PRODUCT_SHARE)


def _rounds(linears: dict[str, int], room: int) -> Iterator[list[str]]:
    """Linears whose products are held at the same time."""
    names: list[str] = []
    size = 0
    for name, inputs in linears.items():
        if names and size + 4 * inputs**2 > room:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * inputs**2
    if names:
        yield names
