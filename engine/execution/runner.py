"""One rank: turns plans into flat batches, runs the compiled program, returns tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from engine.execution.bias import add_bias
from engine.execution.cache import Cache
from engine.execution.filled import Filled, Queued, StagingShape
from engine.execution.history import Histories
from engine.execution.masks import Masks
from engine.scheduling.budget import MAX_SCORED_ROWS
from engine.scheduling.plan import Move, Plan, StepResult
from engine.scheduling.sequence import Sequence
from kernels.backend import AheadProgram, Backend, Program
from kernels.batch import Batch, Int32, Int64, Sampling, counter_uniform
from kernels.steps import QueueProgram, StepQueue, Tables

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
# Moves that a queue makes itself.
COPIES = (Move.COPY, Move.COPY_WINDOW)


class Runner:
    """Per-sequence values live at its slot; a step's arrays are its own, so that the next step can
    be filled while it runs. Of the `programs` the last runs steps that are busy. With `queued`
    steps go to the device's queue, if it has one, wherever they need nothing of Python."""

    def __init__(
        self,
        backend: Backend,
        programs: SequenceOf[Program],
        cache: Cache,
        shape: StagingShape,
        masks: Masks,
        *,
        queued: bool = False,
    ) -> None:
        self._backend = backend
        self._programs = programs
        self._cache = cache
        self._shape = shape
        slots = shape.slots
        self._page_table = np.zeros((slots, shape.pages_per_sequence), np.int32)
        self._pages_written = [0] * slots
        windows = (slots if shape.window_pages else 0, shape.pages_per_sequence)
        self._window_table = np.zeros(windows, np.int32)
        self._seed = np.zeros(slots, np.uint64)
        # The token last drawn at each slot: the next step's input, also if nobody has seen it yet.
        self._last_ids = np.zeros(slots, np.int64)
        # One gather a matrix picks the parameters of a step's rows: `[parameter, slot]`.
        self._floats = np.zeros((len(FLOATS), slots), np.float32)
        self._ints = np.zeros((len(INTS), slots), np.int32)
        self._edits = [False] * slots
        self._histories = Histories(shape.vocab_size)
        self._masks = masks
        self._behind = isinstance(programs[0], AheadProgram)
        # The last step, if it only decoded and nothing but positions changes in the next.
        self._decoding: list[Sequence] = []
        self._last: Filled | Queued | None = None
        self.queue: StepQueue | None = None
        if queued and isinstance(programs[0], QueueProgram):
            window_table = self._window_table if shape.window_pages else None
            size = shape.page_size
            self.queue = programs[0].queue(
                Tables(self._page_table, window_table, size, self._seed, self._last_ids)
            )

    def fill(self, plan: Plan) -> Filled | Queued:
        """Copy everything the step needs out of the plan; the plan may change afterwards."""
        for sequence in plan.admitted:
            self._enter(sequence)
        for sequence in plan.grown:
            self._write_pages(sequence)
        decodes = plan.decodes
        last = self._last
        same = last is not None and not plan.chunks and not plan.kept and decodes == self._decoding
        if same and isinstance(last, Queued) and not plan.moves:
            assert self.queue is not None
            self._last = Queued(self.queue.following(last.step), self._program(plan))
            return self._last
        if same and isinstance(last, Filled):
            filled = self._advance(last, plan)
        else:
            filled = self._fill(plan)
        ready = self._queued(filled)
        plain = not plan.chunks and not plan.kept and not any(self._edits[s.slot] for s in decodes)
        self._last, self._decoding = (ready, decodes) if plain else (None, [])
        return ready

    def rest(self) -> bool:
        """While no step runs: do a little for those to come; False if there is nothing to do."""
        return self._cache.rest()

    def start(self, queued: Queued, told: int) -> None:
        """Have the queue run a step; `told`, a file descriptor, gets a byte when it has ended."""
        assert self.queue is not None
        self.queue.submit(queued.step, queued.program, told)

    def collect(self, queued: Queued) -> StepResult:
        """What a queued step gave, once it has ended. Raises what it raised."""
        ids, move, forward, sample = queued.step.result()
        seconds = {"forward": forward, "sample": sample, "fill": queued.fill_seconds}
        if move:
            seconds["move"] = move
        return StepResult(ids, [None] * len(ids), [[]] * len(ids), seconds)

    def drain(self) -> None:
        """Wait until all queued steps have ended."""
        assert self.queue is not None
        self.queue.drain()

    def end(self, seconds: float) -> bool:
        """Queue no more steps; False if those there are take longer."""
        assert self.queue is not None
        return self.queue.close(seconds)

    def run(self, filled: Filled | Queued) -> StepResult:
        """Execute a filled step while no other runs."""
        if isinstance(filled, Queued):
            self.start(filled, -1)
            self.drain()
            return self.collect(filled)
        batch, fed = filled.batch, filled.fed
        start = time.perf_counter()
        seconds = {}
        if filled.moves:
            self._cache.move(filled.moves)
            begin, start = start, time.perf_counter()
            seconds["move"] = start - begin
            if not len(batch.token_ids):
                return StepResult([], [], [], seconds)
        batch.token_ids[:fed] = self._last_ids[batch.table_rows[:fed]]
        filled.program.forward(batch)
        middle = time.perf_counter()
        sampling, faults = self._masks.apply(filled.sampling, filled.held)
        samples = filled.program.sample(sampling)
        ids = samples.ids
        drawn = ids if len(ids) == len(filled.slots) else [ids[row] for row in filled.drawn]
        self._last_ids[filled.slots] = drawn
        self._histories.add(filled.slots, drawn)
        self._masks.drew(filled.held, ids)
        end = time.perf_counter()
        seconds["forward"], seconds["sample"] = middle - start, end - middle
        return StepResult(ids, samples.logprobs, samples.top, seconds, faults)

    @property
    def runs_behind(self) -> bool:
        """Whether the device can be given a step while it runs another."""
        return self._behind

    def needs_history(self, filled: Filled | Queued) -> bool:
        """Whether a step depends on what those before it drew, beyond their last tokens."""
        assert isinstance(filled, Filled), "a device that runs behind has no queue"
        return bool(filled.sampling.penalties or filled.held)

    def launch(self, filled: Filled | Queued) -> Callable[[], StepResult]:
        """Start a filled step on a device that runs behind; what is returned waits for it."""
        assert isinstance(filled, Filled), "a device that runs behind has no queue"
        assert isinstance(filled.program, AheadProgram)
        start = time.perf_counter()
        if filled.moves:
            self._cache.move(filled.moves)
        seconds = {"move": time.perf_counter() - start} if filled.moves else {}
        if not len(filled.batch.token_ids):
            return lambda: StepResult([], [], [], seconds)
        start = time.perf_counter()
        faults: dict[int, str] = {}

        def sampling_of() -> Sampling:
            sampling, found = self._masks.apply(filled.sampling, filled.held)
            faults.update(found)
            return sampling

        wait = filled.program.start(
            filled.batch, sampling_of, filled.fed, filled.drawn, filled.slots
        )
        launched = time.perf_counter()

        def collect() -> StepResult:
            samples = wait()
            ids = samples.ids
            self._histories.add(filled.slots, [ids[row] for row in filled.drawn])
            self._masks.drew(filled.held, ids)
            seconds["sample"], seconds["forward"] = launched - start, time.perf_counter() - launched
            return StepResult(ids, samples.logprobs, samples.top, seconds, faults)

        return collect

    def buffer_bytes(self) -> int:
        """Bytes of activations, logits and staging."""
        tables = self._page_table.nbytes + self._window_table.nbytes
        staging = tables + self._floats.nbytes + self._ints.nbytes
        rows = self._shape.slots + MAX_SCORED_ROWS
        return sum(program.buffer_bytes(rows) for program in self._programs) + staging

    def close(self) -> None:
        """Release the device."""
        self._masks.close()
        self._cache.close()
        self._backend.close()

    def _program(self, plan: Plan) -> Program:
        return self._programs[-1 if plan.busy else 0]

    def _queued(self, filled: Filled) -> Filled | Queued:
        """The same for the queue, if it can run this step by itself."""
        sampling = filled.sampling
        if self.queue is None or filled.held or sampling.edited or not len(filled.batch.token_ids):
            return filled
        if (sampling.targets >= 0).any() or (sampling.top_logprobs >= 0).any():
            return filled
        if any(kind not in COPIES for kind, _, _ in filled.moves):
            return filled
        copies = [(page, to, kind is Move.COPY_WINDOW) for kind, page, to in filled.moves]
        batch, drawn, slots = filled.batch, filled.drawn, filled.slots
        step = self.queue.step(batch, sampling, filled.fed, drawn, slots, copies)
        return Queued(step, filled.program)

    def _advance(self, last: Filled, plan: Plan) -> Filled:
        """The last step again, one token further: most steps are that."""
        before, size = last.batch, self._shape.page_size
        place = before.positions + 1
        batch = Batch(
            token_ids=np.empty_like(before.token_ids),
            positions=place,
            kv_slots=_slots(self._page_table, before.table_rows, place, size),
            query_starts=before.query_starts,
            context_lengths=before.context_lengths + np.int32(1),
            table_rows=before.table_rows,
            page_table=self._page_table,
            sample_rows=before.sample_rows,
            kept_rows=before.kept_rows,
            kept_at=before.kept_at,
        )
        if self._shape.window_pages:
            batch = self._with_windows(batch, before.table_rows, [])
        sampling = last.sampling
        if sampling.drawn:
            uniform = counter_uniform(self._seed[before.table_rows], place + 1)
            sampling = sampling.with_uniform(uniform)
        held, program = last.held, self._program(plan)
        return Filled(batch, sampling, last.fed, last.drawn, last.slots, plan.moves, held, program)

    def _fill(self, plan: Plan) -> Filled:
        size, decodes = self._shape.page_size, plan.decodes
        fed = len(decodes)
        slots = [s.slot for s in decodes]
        positions = [s.scheduled - 1 for s in decodes]
        tokens = [0] * fed
        lengths = [s.scheduled for s in decodes]
        starts = list(range(fed + 1))
        sample_rows = list(range(fed))
        unwritten: list[int] = []
        apart = self._rows_apart(plan)
        for chunk in plan.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            first = len(tokens)
            self._write_pages(sequence)
            if not chunk.write:
                unwritten += range(first, first + chunk.count)
            tokens += chunk.given or sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            sample_rows += range(len(tokens) - chunk.rows, len(tokens))
            rows = chunk.count if apart and chunk.given else 1
            starts += range(len(tokens) - rows + 1, len(tokens) + 1)
            slots += [sequence.slot] * rows
            lengths += range(end - rows + 1, end + 1)
        place = np.array(positions, np.int64)
        query_starts = np.array(starts, np.int32)
        table_rows = np.array(slots, np.int32)
        row_slots = table_rows if not plan.chunks else np.repeat(table_rows, np.diff(query_starts))
        kv_slots = _slots(self._page_table, row_slots, place, size)
        if unwritten:
            kv_slots[unwritten] = self._shape.pages * size
        batch = Batch(
            token_ids=np.array(tokens, np.int64),
            positions=place,
            kv_slots=kv_slots,
            query_starts=query_starts,
            context_lengths=np.array(lengths, np.int32),
            table_rows=table_rows,
            page_table=self._page_table,
            sample_rows=np.array(sample_rows, np.int64),
        )
        if self._shape.window_pages:
            batch = self._with_windows(batch, row_slots, unwritten)
        if self._shape.states:
            after, places = self._kept(batch, plan)
            batch = replace(batch, kept_rows=after, kept_at=places)
        return self._with_sampling(batch, plan)

    def _with_windows(self, batch: Batch, row_slots: Int32, unwritten: list[int]) -> Batch:
        """The same with what layers with window pages need."""
        size = self._shape.page_size
        slots = _slots(self._window_table, row_slots, batch.positions, size)
        if unwritten:
            slots[unwritten] = self._shape.window_pages * size
        return replace(batch, window_slots=slots, window_table=self._window_table)

    def _kept(self, batch: Batch, plan: Plan) -> tuple[Int32, Int32]:
        """After how many of a chunk's rows its state is kept, and where."""
        rows = np.full(len(batch.table_rows), -1, np.int32)
        places = np.zeros(len(batch.table_rows), np.int32)
        for sequence, kept in plan.kept:
            chunk = int(np.flatnonzero(batch.table_rows == sequence.slot)[0])
            start = batch.positions[batch.query_starts[chunk]]
            rows[chunk] = kept.pages * self._shape.page_size - start
            places[chunk] = kept.place
        return rows, places

    def _rows_apart(self, plan: Plan) -> bool:
        """Whether rows that are given should be sequences of one token, as decodes are: each reads
        what those before it have written in the same step. A device that runs behind has faster
        ways for steps of nothing else."""
        if not self._behind:
            return False
        chunks = sum(chunk.count if chunk.given else 1 for chunk in plan.chunks)
        return len(plan.decodes) + chunks <= self._shape.slots

    def _with_sampling(self, batch: Batch, plan: Plan) -> Filled:
        """Parameters of every logits row: of those that draw, and those that score a prompt."""
        decodes = plan.decodes
        fed = len(decodes)
        targets = [-1] * fed
        places = [s.scheduled for s in decodes]
        slots = [s.slot for s in decodes]
        drawn, scored = list(range(fed)), list[int]()
        drawing = [(row, s, s.scheduled) for row, s in enumerate(decodes)]
        drawn_slots = list(slots)
        for chunk in plan.chunks:
            if not chunk.rows:
                continue
            sequence, end = chunk.sequence, chunk.start + chunk.count
            first, row = end - chunk.rows + 1, len(targets)
            if not chunk.given:
                targets += sequence.tokens[first : end + 1 - chunk.sample]
                scored += range(row, len(targets))
            elif not chunk.sample:
                targets += [-1] * chunk.rows
                drawing += [(row + n, sequence, first + n) for n in range(chunk.rows)]
            if chunk.sample:
                drawn.append(len(targets))
                drawn_slots.append(sequence.slot)
                drawing.append((len(targets), sequence, end))
                targets.append(-1)
            places += range(first, end + 1)
            slots += [sequence.slot] * chunk.rows
        bias: tuple[list[int], list[int], list[float]] = ([], [], [])
        penalties, grammars = [], []
        for row, sequence, place in drawing:
            if self._edits[sequence.slot]:
                add_bias(sequence, row, place - sequence.prompt_length, bias)
            if (penalty := self._histories.penalty(sequence.slot, row)) is not None:
                penalties.append(penalty)
            if (held := self._masks.held(sequence.slot)) is not None:
                grammars.append((row, held))
        rows = np.array(slots, np.int64)
        floats, ints = self._floats.take(rows, axis=1), self._ints.take(rows, axis=1)
        top_k, top_logprobs, prompt_logprobs = ints
        if scored:
            top_logprobs[scored] = prompt_logprobs[scored]
        draws = bool(floats[0].any())
        sampling = Sampling(
            targets=np.array(targets, np.int64),
            **dict(zip(FLOATS, floats, strict=True)),
            top_k=top_k,
            uniform=(
                counter_uniform(self._seed[rows], np.array(places, np.int64))
                if draws
                else np.zeros(len(rows))
            ),
            top_logprobs=top_logprobs,
            bias_rows=bias[0],
            bias_ids=bias[1],
            bias_values=bias[2],
            penalties=penalties,
        )
        program = self._program(plan)
        return Filled(batch, sampling, fed, drawn, drawn_slots, plan.moves, grammars, program)

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
        self._masks.enter(sequence)

    def _write_pages(self, sequence: Sequence) -> None:
        slot, count = sequence.slot, len(sequence.pages)
        written = self._pages_written[slot]
        if count == written + 1 and not self._shape.window_pages:
            # The next page, as most are.
            page = self._page_table[slot, written] = sequence.pages[written]
            self._cache.use(page + 1, 0)
            self._pages_written[slot] = count
        elif count > written:
            pages, windows = sequence.pages[written:], sequence.window_pages[written:]
            self._page_table[slot, written:count] = pages
            if self._shape.window_pages:
                # What was not attached is never used; any page may stand there.
                self._window_table[slot, written:count] = np.maximum(windows, 0)
            self._cache.use(max(pages) + 1, max(windows, default=0) + 1)
            self._pages_written[slot] = count


def _slots(table: Int32, rows: Int32, positions: Int64, size: int) -> Int64:
    """Flat slots of positions, by their rows of a table of pages."""
    return table[rows, positions // size].astype(np.int64) * size + positions % size
