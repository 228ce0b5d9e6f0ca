"""One rank: turns plans into flat batches, runs the compiled program, returns tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from engine.execution.history import Histories
from engine.scheduling.scheduler import Plan, StepResult
from engine.scheduling.sequence import Sequence
from kernels.backend import Backend, Program
from kernels.batch import Batch, Sampling, counter_uniform

LOWEST_TEMPERATURE = 1e-5
# Sampling parameters by their place in the staging matrices.
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
INTS = ("top_k", "logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class StagingShape:
    """What the staging buffers hold at most."""

    tokens: int
    slots: int
    pages_per_sequence: int
    page_size: int
    vocab_size: int


class Runner:
    """Fills staging buffers that are allocated once; per-sequence values live at its slot."""

    def __init__(self, backend: Backend, program: Program, shape: StagingShape) -> None:
        self._backend = backend
        self._program = program
        self._shape = shape
        slots = shape.slots
        self._page_table = np.zeros((slots, shape.pages_per_sequence), np.int32)
        self._pages_written = [0] * slots
        self._seed = np.zeros(slots, np.uint64)
        # One gather a matrix picks the parameters of a step's rows: `[parameter, slot]`.
        self._floats = np.zeros((len(FLOATS), slots), np.float32)
        self._ints = np.zeros((len(INTS), slots), np.int32)
        self._edits = [False] * slots
        self._histories = Histories(shape.vocab_size)
        self._batch: Batch
        self._sampling: Sampling
        # The last step's sequences, if each of them only decoded, with nothing that changes.
        self._decoding: list[Sequence] = []

    def fill(self, plan: Plan) -> None:
        """Copy everything the step needs out of the plan; the plan may change afterwards."""
        for sequence in plan.admitted:
            self._enter(sequence)
        if not plan.admitted and self._advance(plan):
            return
        self._decoding = []
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for chunk in plan.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            tokens += sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            starts.append(len(tokens))
            slots.append(sequence.slot)
            self._write_pages(sequence)
        self._batch = self._make_batch(tokens, positions, slots, starts, plan)
        self._sampling = self._make_sampling(plan)
        if self._is_plain(plan):
            self._decoding = [c.sequence for c in plan.chunks]

    def run(self) -> StepResult:
        """Execute the filled step."""
        start = time.perf_counter()
        self._program.forward(self._batch)
        middle = time.perf_counter()
        samples = self._program.sample(self._sampling)
        end = time.perf_counter()
        seconds = {"forward": middle - start, "sample": end - middle}
        return StepResult(samples.ids, samples.logprobs, samples.top, seconds)

    def close(self) -> None:
        """Release the device."""
        self._backend.close()

    def _is_plain(self, plan: Plan) -> bool:
        """Whether all chunks decode one token, without biases or histories."""
        return all(
            c.count == 1 and c.sample and not self._edits[c.sequence.slot]
            and not c.sequence.request.sampling.has_penalties
            for c in plan.chunks
        )  # fmt: skip

    def _advance(self, plan: Plan) -> bool:
        """Fill a step of the last one's sequences, one token further: most steps are that."""
        chunks, decoding = plan.chunks, self._decoding
        if not decoding or len(chunks) != len(decoding):
            return False
        for chunk, sequence in zip(chunks, decoding, strict=True):
            if chunk.sequence is not sequence:
                return False
        batch, size = self._batch, self._shape.page_size
        for sequence in decoding:
            self._write_pages(sequence)
        batch.token_ids[:] = [sequence.tokens[-1] for sequence in decoding]
        place = batch.positions
        place += 1
        np.add(batch.context_lengths, 1, out=batch.context_lengths)
        pages = self._page_table[batch.table_rows, place // size]
        np.add(pages * size, place % size, out=batch.kv_slots)
        sampling = self._sampling
        if sampling.temperature.any():
            sampling.uniform = counter_uniform(self._seed[batch.table_rows], place + 1)
        return True

    def _enter(self, sequence: Sequence) -> None:
        """Write what stays the same while a sequence holds its slot."""
        slot, sampling = sequence.slot, sequence.request.sampling
        self._pages_written[slot] = 0
        self._seed[slot] = sequence.seed
        # Dividing by less would overflow, and no draw could differ from the likeliest token.
        greedy = sampling.temperature < LOWEST_TEMPERATURE
        logprobs, prompt_logprobs = sampling.logprobs, sampling.prompt_logprobs
        self._floats[:, slot] = (
            0.0 if greedy else sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        self._ints[:, slot] = (
            max(sampling.top_k, 0),
            -1 if logprobs is None else logprobs,
            -1 if prompt_logprobs is None else prompt_logprobs,
        )
        self._edits[slot] = bool(sampling.logit_bias) or sampling.min_tokens > 0
        self._histories.enter(sequence)

    def _write_pages(self, sequence: Sequence) -> None:
        slot, count = sequence.slot, len(sequence.pages)
        written = self._pages_written[slot]
        if count > written:
            self._page_table[slot, written:count] = sequence.pages[written:]
            self._pages_written[slot] = count

    def _make_batch(
        self,
        tokens: list[int],
        positions: list[int],
        slots: list[int],
        starts: list[int],
        plan: Plan,
    ) -> Batch:
        size = self._shape.page_size
        place = np.array(positions, np.int64)
        query_starts = np.array(starts, np.int32)
        table_rows = np.array(slots, np.int32)
        decodes_only = len(positions) == len(slots)
        row_slots = table_rows if decodes_only else np.repeat(table_rows, np.diff(query_starts))
        pages = self._page_table[row_slots, place // size].astype(np.int64)
        lengths = [chunk.start + chunk.count for chunk in plan.chunks]
        sample_rows: list[int] = []
        for chunk, end in zip(plan.chunks, starts[1:], strict=True):
            if chunk.rows == 1:
                sample_rows.append(end - 1)
            elif chunk.rows:
                sample_rows += range(end - chunk.rows, end)
        return Batch(
            token_ids=np.array(tokens, np.int64),
            positions=place,
            kv_slots=pages * size + place % size,
            query_starts=query_starts,
            context_lengths=np.array(lengths, np.int32),
            table_rows=table_rows,
            page_table=self._page_table,
            sample_rows=np.array(sample_rows, np.int64),
        )

    def _make_sampling(self, plan: Plan) -> Sampling:
        targets: list[int] = []
        places: list[int] = []
        slots: list[int] = []
        scored: list[int] = []
        bias: tuple[list[int], list[int], list[float]] = ([], [], [])
        penalties = []
        for chunk in plan.chunks:
            if not chunk.rows:
                continue
            sequence, slot = chunk.sequence, chunk.sequence.slot
            end = chunk.start + chunk.count
            first = end - chunk.rows + 1
            if chunk.rows > 1 or not chunk.sample:
                scored += range(len(targets), len(targets) + chunk.rows - chunk.sample)
            targets += sequence.tokens[first : end + 1]
            if chunk.sample:
                if self._edits[slot]:
                    _add_bias(sequence, len(targets), bias)
                if (penalty := self._histories.penalty(sequence, len(targets))) is not None:
                    penalties.append(penalty)
                targets.append(-1)
            places += range(first, end + 1)
            slots += [slot] * chunk.rows
        rows = np.array(slots, np.int64)
        floats, ints = self._floats.take(rows, axis=1), self._ints.take(rows, axis=1)
        top_k, top_logprobs, prompt_logprobs = ints
        if scored:
            top_logprobs[scored] = prompt_logprobs[scored]
        drawn = bool(floats[0].any())
        return Sampling(
            targets=np.array(targets, np.int64),
            **dict(zip(FLOATS, floats, strict=True)),
            top_k=top_k,
            uniform=(
                counter_uniform(self._seed[rows], np.array(places, np.int64))
                if drawn
                else np.zeros(len(rows))
            ),
            top_logprobs=top_logprobs,
            bias_rows=bias[0],
            bias_ids=bias[1],
            bias_values=bias[2],
            penalties=penalties,
        )


def _add_bias(sequence: Sequence, row: int, bias: tuple[list[int], list[int], list[float]]) -> None:
    """The request's logit bias, and no end of sequence before `min_tokens`."""
    sampling = sequence.request.sampling
    addends = dict(sampling.logit_bias)
    if sequence.generated < sampling.min_tokens:
        ends = {*sampling.stop_token_ids, *sequence.request.eos_token_ids}
        addends.update(dict.fromkeys(ends, float("-inf")))
    bias[0].extend([row] * len(addends))
    bias[1].extend(addends)
    bias[2].extend(addends.values())
