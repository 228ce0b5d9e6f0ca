"""A queue of steps on a native thread."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernels.backend import Program
from kernels.batch import Batch, Sampling
from kernels.cpu.native_sampling import address
from kernels.steps import Copy, Step, Tables

if TYPE_CHECKING:
    from kernels.cpu.native_program import NativeProgram


class NativeQueue:
    """See `StepQueue`; programs are `NativeProgram`s of one device."""

    def __init__(self, native: ModuleType, device: Any, tables: Tables) -> None:
        self._tables = tables  # the queue holds addresses into them
        self._make_step = native.make_step
        windows = tables.windows
        self._queue = native.StepQueue(
            device,
            pages=address(tables.pages),
            windows=0 if windows is None else address(windows),
            width=tables.pages.shape[1],
            page_size=tables.page_size,
            seeds=address(tables.seeds),
            last_ids=address(tables.last_ids),
        )
        self.following = self._queue.following
        self.drain = self._queue.drain
        self.close = self._queue.close

    def step(
        self,
        batch: Batch,
        sampling: Sampling,
        fed: int,
        drawn: Sequence[int],
        slots: Sequence[int],
        copies: Sequence[Copy] = (),
    ) -> Step:
        step: Step = self._make_step(
            token_ids=batch.token_ids,
            positions=batch.positions,
            kv_slots=batch.kv_slots,
            window_slots=batch.window_slots,
            sample_rows=batch.sample_rows,
            query_starts=batch.query_starts,
            context_lengths=batch.context_lengths,
            table_rows=batch.table_rows,
            kept_rows=batch.kept_rows,
            kept_at=batch.kept_at,
            fed=fed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            uniform=sampling.uniform,
            drawn=drawn,
            slots=slots,
            copies=copies,
        )
        return step

    def submit(self, step: Step, program: Program, told: int) -> None:
        native: NativeProgram = program  # type: ignore[assignment]
        self._queue.submit(step, *native.handle, told)
