"""Every invariant of a scheduler, between any two of its steps."""

from __future__ import annotations

from engine.scheduling.recurrent import RecurrentPrefixes
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import State


def audit(scheduler: Scheduler) -> None:
    """Raises AssertionError if anything is lost, held twice or given away."""
    running = scheduler.running
    retiring = [pages for plan in scheduler.in_flight for pages in plan.retired_pages]
    scheduler.pool.audit([*(s.pages for s in running), *retiring, *scheduler.prefixes.sources])
    if (windows := scheduler.pool.windows) is not None:
        windows.audit([s.window_pages[s.window_start :] for s in running])
        assert all(len(s.window_pages) == len(s.pages) for s in running)
    slots = [s.slot for s in running] + scheduler._slots
    slots += [slot for plan in scheduler.in_flight for slot in plan.retired_slots]
    assert sorted(slots) == list(range(scheduler.limits.max_running)), "a slot is lost"
    assert all(s.state is State.RUNNING for s in running)
    assert all(s.state is State.WAITING and not s.pages for s in scheduler.queue)
    assert sum(1 for _ in scheduler.queue) == len(scheduler.queue)
    assert sum(len(s.tokens) for s in scheduler.queue) == scheduler.queue.tokens
    if isinstance(scheduler.prefixes, RecurrentPrefixes):
        kept = [kept.place for plan in scheduler.in_flight for _, kept in plan.kept]
        scheduler.prefixes.snapshots.audit(kept)
        holders = set(scheduler.prefixes._goals) | set(scheduler.prefixes._last)
        assert holders <= set(running), "somebody who has gone keeps states"
        promising = set(scheduler.prefixes._promised.values())
        assert promising <= set(running), "somebody who has gone has promised a state"
    for account in scheduler.queue.accounts.values():
        held = sum(s.account is account for s in running)
        assert account.running == held, "a tenant's count is off"
    for sequence in running:
        assert sequence.decoding == (sequence in scheduler.decoding)
        assert sequence.computed <= sequence.scheduled
        assert sequence.scheduled <= len(sequence.pages) * scheduler.pool.page_size
        drawn = sequence.scheduled + 1 - len(sequence.tokens)
        given = [c for p in scheduler.in_flight for c in p.chunks if c.given]
        mine = sum(c.count for c in given if c.sequence is sequence)
        if sequence.decoding:
            most = len(scheduler.in_flight) + mine
            assert 0 <= drawn <= most, "a token is lost or was drawn twice"
