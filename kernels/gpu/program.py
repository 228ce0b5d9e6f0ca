"""A tape on a GPU: captured once for a few sizes of batch, replayed with one launch a part.

A step is three graphs: the layers up to the last attention, for a bucket of token rows, the head
(what is behind it) and the draw, for a bucket of logits rows. All are captured before the first
request, largest first, in one memory pool; nothing is compiled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernels.backend import available_cores
from kernels.batch import Batch, Samples, Sampling
from kernels.gpu.draws import Draws
from kernels.gpu.experts import Layout
from kernels.gpu.fuse import Step, fuse, handles
from kernels.gpu.launch import compile_all
from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.workspace import Bucket
from kernels.sampling import score
from kernels.tape import Handle, Instruction, Rows, Tape


@dataclass(frozen=True)
class Limits:
    """The largest step: token rows, chunks, and logits rows."""

    rows: int
    sequences: int
    samples: int


def buckets(most: int, least: int = 1) -> list[int]:
    """Sizes that a number up to `most` is rounded up to: doubling, with halfway steps from 16."""
    sizes, size = set(), least
    while size < most:
        sizes.add(size)
        if size >= 16 and size + size // 2 < most:
            sizes.add(size + size // 2)
        size *= 2
    return sorted({*sizes, most})


class Graphs:
    """Captures what it is given on a GPU; elsewhere (the interpreter) it just runs it."""

    def __init__(self, device: torch.device, *, capture: bool, ranks: int) -> None:
        self._at_once = max(1, available_cores() // ranks)
        self._capture = capture and device.type == "cuda"
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None
        # One stream for all: cuBLAS keeps a workspace for each that it sees.
        self._stream: Any = torch.cuda.Stream(device) if self._capture else None  # type: ignore[no-untyped-call]

    def prepare_all(self, launches: Mapping[Any, Callable[[], None]]) -> None:
        """Compile everything at once, then warm up and capture one by one, in this order."""
        if not self._capture:
            return
        with torch.cuda.stream(self._stream):
            compile_all(launches.values(), self._at_once)
        for key, launch in launches.items():
            self.prepare(key, launch)

    def prepare(self, key: Any, launches: Callable[[], None]) -> None:
        """Warm up and capture; without a key only what comes before."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            launches()
        torch.cuda.synchronize()
        if key is None:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            launches()
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph

    def run(self, key: Any, launches: Callable[[], None]) -> None:
        """Replay what was prepared under the key, or launch."""
        graph = self._graphs.get(key)
        if graph is None:
            launches()
        else:
            graph.replay()


class GpuProgram:
    """A compiled tape with its staging, its graphs and its sampler."""

    def __init__(
        self,
        tape: Tape,
        ops: GpuOps,
        staging: Staging,
        limits: Limits,
        device: torch.device,
        *,
        capture: bool = True,
    ) -> None:
        self._tape = tape
        self._ops = ops
        self._staging = staging
        self._limits = limits
        self._device = device
        self._pinned = device.type == "cuda"
        self._layers, self._head = split(tape)
        after = {h.index for i, _ in self._head for h in handles(i.arguments)}
        self._row_layers = fuse(self._layers, after, ops.fits_row, ops.fits_heads)
        self._row_head = fuse(self._head, {tape.logits.index}, ops.fits_row, ops.fits_heads)
        self._selected: dict[int, torch.Tensor] = {}
        vocab, samples = tape.logits.width, limits.samples
        self._logits = torch.zeros(samples, vocab, dtype=torch.float32, device=device)
        self._targets = {tape.logits.index: self._logits}
        ends = [instruction for instruction, _ in self._head]
        if ends and ends[-1].op == "softcap":
            # Capped where they are.
            self._targets[ends.pop().arguments[0].index] = self._logits
        if ends and ends[-1].op == "all_gather":
            # A rank's part of them, as exact as the whole.
            part: Handle = ends[-1].arguments[0]
            self._targets[part.index] = torch.zeros(
                samples, part.width, dtype=torch.float32, device=device
            )
        self._draws = Draws(samples, vocab, staging.last_ids, device)
        self._rows = 0
        self._row_buckets = buckets(limits.rows, 16)
        self._decode_buckets = buckets(min(limits.sequences, limits.rows))
        self._sample_buckets = buckets(samples)
        self._graphs = Graphs(device, capture=capture, ranks=ops.ranks)
        self._prepare()

    @torch.inference_mode()
    def start(
        self,
        batch: Batch,
        sampling_of: Callable[[], Sampling],
        fed: int,
        drawn: Sequence[int],
        slots: Sequence[int],
    ) -> Callable[[], Samples]:
        """Launch a step behind those that run, see `AheadProgram`; logprobs wait for it here."""
        self._forward(batch, fed)
        sampling = sampling_of()
        count = len(sampling.targets)
        ids = self._draws.draw(self._logits, sampling, self._replay_draw, drawn, slots)
        # Its own memory on both sides: the next step draws to the same place.
        kept = torch.empty(count, dtype=torch.int64, pin_memory=self._pinned)
        kept.copy_(ids, non_blocking=True)
        done = torch.cuda.Event() if self._pinned else None  # type: ignore[no-untyped-call]
        if done is not None:
            done.record()
        result = Samples([])
        score(self._logits[:count], ids, sampling, result)

        def wait() -> Samples:
            if done is not None:
                done.synchronize()
            result.ids = kept.tolist()
            return result

        return wait

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        """Compute the logits of the batch's sampled rows and keep them."""
        self._forward(batch, 0)

    def _forward(self, batch: Batch, fed: int) -> None:
        if self._pinned:
            torch.cuda.set_device(self._device)  # a thread starts with the first
        self._staging.copy(batch, fed)
        rows, self._rows = len(batch.token_ids), len(batch.sample_rows)
        decode = rows == len(batch.context_lengths) == self._rows
        bucket = self._decode(rows) if decode else self._mixed(rows)
        self._graphs.run(bucket, lambda: self._run_layers(bucket))
        if self._rows:
            samples = fit(self._rows, self._sample_buckets)
            self._graphs.run(samples, lambda: self._run_head(samples))

    @torch.inference_mode()
    def sample(self, sampling: Sampling) -> Samples:
        """Draw or score one token for each row of the kept logits."""
        count = len(sampling.targets)
        if not count:
            if self._pinned:
                torch.cuda.synchronize(self._device)  # so that the step takes as long as it takes
            return Samples([])
        ids = self._draws.draw(self._logits, sampling, self._replay_draw)
        result = Samples(ids.tolist())
        score(self._logits[:count], ids, sampling, result)
        return result

    def buffer_bytes(self, sampled_rows: int) -> int:
        """Bytes of activations, at their most, and of logits."""
        widest = sum(sorted(h.width for i in self._tape.instructions for h in i.results)[-3:])
        beside = (bytes_beside(i, self._limits.rows) for i in self._tape.instructions)
        return self._limits.rows * widest * 2 + max(beside, default=0) + self._logits.nbytes

    def logits(self) -> torch.Tensor:
        """The kept logits, fp32 `[samples, vocab]`, on the host."""
        return self._logits[: self._rows].cpu()

    def _decode(self, rows: int) -> Bucket:
        size = fit(rows, self._decode_buckets)
        return Bucket(size, size, size, decode=True)

    def _mixed(self, rows: int) -> Bucket:
        limits = self._limits
        return Bucket(fit(rows, self._row_buckets), limits.sequences, limits.samples, decode=False)

    @torch.inference_mode()
    def _prepare(self) -> None:
        launches: dict[Any, Callable[[], None]] = {None: partial(self._draws.warm_up, self._logits)}
        for size in reversed(self._row_buckets):
            launches[self._mixed(size)] = partial(self._run_layers, self._mixed(size))
        for size in reversed(self._decode_buckets):
            launches[self._decode(size)] = partial(self._run_layers, self._decode(size))
        for size in reversed(self._sample_buckets):
            launches[size] = partial(self._run_head, size)
            for filtered in (True, False):
                draw = partial(self._draws.launch, size, self._logits, filtered=filtered)
                launches["draw", size, filtered] = draw
        self._graphs.prepare_all(launches)

    def _run_layers(self, bucket: Bucket) -> None:
        """The layers, and the rows of their results that the head wants, at a fixed place."""
        self._ops.bucket = bucket
        row = bucket.decode and bucket.rows == 1
        values = self._replay(self._row_layers if row else self._layers, {})
        for index, value in values.items():
            if index not in self._selected:
                # From the next time on they are written there.
                size = (self._limits.samples, value.shape[1])
                kept = torch.zeros(size, dtype=value.dtype, device=self._device)
                kept[: bucket.samples].copy_(value)
                self._selected[index] = self._targets[index] = kept

    def _replay_draw(self, count: int, filtered: bool) -> None:
        rows = fit(count, self._sample_buckets)
        launch = partial(self._draws.launch, rows, self._logits, filtered=filtered)
        self._graphs.run(("draw", rows, filtered), launch)

    def _run_head(self, samples: int) -> None:
        values = {index: value[:samples] for index, value in self._selected.items()}
        self._replay(self._row_head if samples == 1 else self._head, values)

    def _replay(self, steps: Sequence[Step], values: dict[int, Any]) -> dict[int, torch.Tensor]:
        for instruction, dead in steps:
            arguments = [
                values[a.index] if isinstance(a, Handle) else a for a in instruction.arguments
            ]
            self._ops.target = self._targets.get(instruction.results[-1].index)
            produced = getattr(self._ops, instruction.op)(*arguments)
            if len(instruction.results) == 1:
                produced = (produced,)
            for handle, value in zip(instruction.results, produced, strict=True):
                values[handle.index] = value
            for index in dead:
                values.pop(index)
        return values


def split(tape: Tape) -> tuple[list[Step], list[Step]]:
    """What runs on token rows, the selection included, and what runs on logits rows."""
    steps = list(zip(tape.instructions, tape.last_use, strict=True))
    layers = [s for s in steps if s[0].op == "select_rows" or s[0].results[0].rows is Rows.TOKENS]
    head = [s for s in steps if s not in layers]
    return layers, head


def bytes_beside(instruction: Instruction, rows: int) -> int:
    """What an op takes beside its input and output: a delta net its channels in fp32, experts rows
    laid out, their gates, and what the gates leave; 0 for others."""
    if instruction.op == "delta":
        channels: int = instruction.arguments[3].width
        return rows * channels * 4
    if instruction.op != "experts":
        return 0
    _, _, _, down, experts, *_ = instruction.arguments
    layout = Layout(experts, rows)
    width: int = down.shape[0] // experts.own + 3 * down.shape[1]
    return layout.blocks * layout.block_rows * width * 2


def fit(number: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that holds so many."""
    return next(size for size in sizes if size >= number)
