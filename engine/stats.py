"""What listeners are told of a step."""

from __future__ import annotations

from collections.abc import Iterable

from engine.parts import Parts
from engine.scheduling.plan import Plan
from engine.types import Decision, Ran, StepStats


def step_stats(
    plan: Plan,
    parts: Parts,
    seconds: dict[str, float],
    gaps: dict[float, int],
    notes: Iterable[Decision],
) -> StepStats:
    """The statistics of a step that has been committed and delivered, as of now; `notes` are what
    was decided between steps."""
    scheduler = parts.scheduler
    pool = scheduler.pool
    given = [chunk for chunk in plan.chunks if chunk.given]
    return StepStats(
        step=plan.step,
        at=parts.clock.now(),
        prefill_tokens=plan.work.prefill,
        decode_rows=len(plan.decodes) + len(given),
        drafted=sum(chunk.count - 1 for chunk in given),
        accepted=plan.accepted,
        predicted=plan.predicted,
        running=len(scheduler.decoding) + len(scheduler.prefilling),
        waiting=len(scheduler.queue),
        pages_used=pool.used,
        pages_cached=pool.cached,
        pages_total=pool.total,
        preemptions=scheduler.preemptions,
        seconds=seconds,
        decisions=(*notes, *plan.decisions),
        prefills=tuple(
            Ran(c.sequence.request.id, c.start, c.count, c.sample, c.sequence.index)
            for c in plan.chunks
            if not c.given
        ),
        gaps=gaps,
        busy=plan.busy,
        served=[*plan.decodes, *(c.sequence for c in plan.chunks)] if plan.chunks else plan.decodes,
    )
