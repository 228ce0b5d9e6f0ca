"""What a model's linears are given by a text.

The model's tape is run a linear at a time: all windows of the text up to it, then all of them
through it and on to the next. So the text goes through the model once, and what one linear is given
is all that is held of it. Whoever changes linears meanwhile changes nothing here: fitted behind
others that are rounded or narrower already, they came out worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.compression.fit import Inputs
from engine.compression.folder import SHARD_BYTES
from engine.errors import ConfigError
from engine.execution.memory import available_memory
from engine.models import cache_layout, load_model
from engine.models.config import read_config
from engine.weights.checkpoint import Checkpoint
from kernels.backend import TORCH_DTYPES, DType, HostTensor
from kernels.batch import Batch
from kernels.cpu.torch_ops import TorchCpuOps
from kernels.ops import Weight
from kernels.reference import part_of, tensor_of
from kernels.routing import route
from kernels.tape import Handle, Instruction, Recorder, Tape
from kernels.torch_backend import TorchBackend

PAGE = 16
# Matrices as large as the widest linear's products that fitting one takes.
FITTING = 5


def _dtype(checkpoint: Checkpoint) -> DType:
    """In which the weights are kept: as they are stored, if that is bfloat16."""
    formats = {checkpoint.tensor(name).format for name in checkpoint.names()}
    return "bfloat16" if "BF16" in formats else "float32"


@dataclass(frozen=True)
class Linear:
    """Matrices of one linear by their `names`, and what they are all given."""

    names: list[str]
    inputs: Inputs


class FloatOps(TorchCpuOps):
    """Multiplies in fp32, whatever the weights are kept in."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        # One at a time: processors without bfloat16 products are ten times slower in them.
        placed = tensor_of(weight)
        bias = None if placed.bias is None else placed.bias.float()
        return torch.nn.functional.linear(x, placed.tensor.float(), bias)


class FloatBackend(TorchBackend):
    """Knows the tensors of which each weight was made, by its name."""

    def __init__(self, dtype: DType) -> None:
        super().__init__("torch", FloatOps, dtype)
        self.names: dict[str, list[str]] = {}

    def load(
        self, parts: Sequence[HostTensor], bias: Sequence[HostTensor] = (), *, bits: int = 4
    ) -> Weight:
        weight = super().load(parts, bias, bits=bits)
        self.names[weight.name] = [part.name for part in parts]
        return weight


class Calibration:
    """A float model, and windows of a text on their way through it."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
        backend = FloatBackend(_dtype(checkpoint))
        model = load_model(checkpoint, backend)
        experts = model.config.experts
        if experts is not None and experts.shared > 1:
            raise ConfigError(
                f"{checkpoint.path}: {experts.shared} shared experts in one cannot be fitted to a "
                "text; leave the text out"
            )
        longest = max(map(len, windows))
        self._pages = -(-longest // PAGE)
        layout = cache_layout(model, PAGE, "float32", longest)
        # One for all windows: what a layer's attention reads has been written just before.
        backend.allocate_cache(layout, self._pages, states=1)
        recorder = Recorder()
        self._tape: Tape = recorder.finish(model.forward(recorder))
        self._ops = backend.ops()
        self._names = backend.names
        self._batches = [self._batch(window) for window in windows]
        # What has been computed of each window and is still wanted.
        self._values: list[dict[int, torch.Tensor]] = [{} for _ in windows]
        # What the head would say is not asked for.
        self.weights: dict[int, Sequence[Weight]] = {
            number: i.arguments[1:2] if i.op == "linear" else i.arguments[2:4]
            for number, i in enumerate(self._tape.instructions[:-1])
            if i.op in ("linear", "experts")
        }
        """A linear's weight, or both of a layer's experts, by the place in the tape."""

    def names(self, weight: Weight) -> list[str]:
        """The tensors that are stacked in a weight."""
        return self._names[weight.name]

    @torch.inference_mode()
    def through(self, places: Sequence[int], progress: Callable[[], None]) -> Iterator[Linear]:
        """The linears at these places, in order, with what they are given. `progress` is told of
        every window on its way to each."""
        start = 0
        for place in places:
            instruction = self._tape.instructions[place]
            for batch, values in zip(self._batches, self._values, strict=True):
                self._ops.begin(batch)
                self._tape.run(self._ops, values, start, place)
                progress()
            start = place
            if instruction.op == "experts":
                yield from self._experts(instruction)
            else:
                weight, given = instruction.arguments[1], self._given(instruction)
                inputs = inputs_of(weight.name, weight.shape[1], given)
                yield Linear(self.names(weight), inputs)

    def _given(self, instruction: Instruction, argument: int = 0) -> Iterator[torch.Tensor]:
        """What one of an instruction's arguments is, a window at a time."""
        handle: Handle = instruction.arguments[argument]
        return (values[handle.index].float() for values in self._values)

    def _experts(self, instruction: Instruction) -> Iterator[Linear]:
        """The linears of a layer's experts, each with the rows that go through it. Where these are
        fewer than its inputs, whose relations they would show by chance, others fill them up."""
        _, _, gate_up, down, experts, activation, preference, _ = instruction.arguments
        rows = torch.cat(list(self._given(instruction)))
        scores = torch.cat(list(self._given(instruction, 1)))
        liked = tensor_of(preference).tensor if preference is not None else None
        chosen, _ = route(scores, experts, liked)
        least = max(gate_up.shape[1], down.shape[1])
        first = self.names(gate_up)
        for number, name in enumerate(self.names(down)):
            own = (chosen == number).any(1)
            x = torch.cat([rows[own], evenly(rows[~own], least - int(own.sum()))])
            names = first[2 * number : 2 * number + 2]
            yield Linear(names, inputs_of(names[0], gate_up.shape[1], [x]))
            hidden = self._ops.linear(x, part_of(gate_up, number, experts.own))
            hidden = self._ops.gated(hidden, activation)
            yield Linear([name], inputs_of(name, down.shape[1], [hidden]))

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


def inputs_of(name: str, width: int, windows: Iterable[torch.Tensor]) -> Inputs:
    """What a linear is given, fp32 `[rows, width]` a window. Raises ConfigError if that is no
    number."""
    products, count = torch.zeros(width, width), 0
    for x in windows:
        products.addmm_(x.T, x)
        count += len(x)
    if not products.isfinite().all():
        raise ConfigError(
            f"what {name!r} is given is not finite: some weight in front of it is not, or overflows"
        )
    return Inputs(products, count)


def evenly(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` of the rows, from all of them."""
    places = torch.linspace(0, max(0, len(rows) - 1), max(0, min(count, len(rows))))
    return rows[places.long()]


def calibrated(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    wanted: Callable[[str, int], bool],
    progress: Callable[[str, int, int], None],
) -> Iterator[Linear]:
    """The linears of which all matrices are `wanted`, for their name and number of inputs, with
    what they are given over all windows; see `Calibration.through`. Raises ConfigError if there are
    too few tokens, or too little memory."""
    tokens = sum(map(len, windows))
    _check_memory(checkpoint, tokens)
    calibration = Calibration(checkpoint, windows)
    places = [
        place
        for place, weights in calibration.weights.items()
        if all(wanted(part, w.shape[1]) for w in weights for part in calibration.names(w))
    ]
    chosen = [weight for place in places for weight in calibration.weights[place]]
    widest = max((weight.shape[1] for weight in chosen), default=0)
    if tokens < widest:
        raise ConfigError(
            f"the text gives {tokens} tokens, but what {widest} inputs of a layer have to do with "
            f"each other takes at least as many, better {4 * widest}; give a longer one"
        )
    done, total = 0, len(windows) * len(places)

    def on() -> None:
        nonlocal done
        done += 1
        progress("calibrate", done, total)

    yield from calibration.through(places, on)


def _check_memory(checkpoint: Checkpoint, tokens: int) -> None:
    """Raises ConfigError if the model, what fitting takes, and the text on its way do not fit."""
    free = available_memory()
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    size = TORCH_DTYPES[_dtype(checkpoint)].itemsize
    weights = sum(math.prod(tensor.shape) for tensor in tensors) * size
    widest = max((tensor.shape[1] for tensor in tensors if len(tensor.shape) > 1), default=0)
    hidden = read_config(checkpoint.config, checkpoint.rope_factors()).hidden
    # The model, fitting, the text on its way, and what waits to be written.
    needed = weights + FITTING * 4 * widest**2 + 4 * tokens * (widest + 2 * hidden)
    needed += min(SHARD_BYTES, weights)
    if free is not None and needed > free:
        raise ConfigError(
            f"calibrating takes about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are "
            "free; without a text it takes little"
        )
