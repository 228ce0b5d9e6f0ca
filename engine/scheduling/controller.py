"""How large the pool of KV pages should be just now: by the memory that is left, and by its use."""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduling.pages import PagePool

# A share of processes that stall for memory (PSI, "some" over ten seconds) above which it is short.
STALLED = 0.10


@dataclass(frozen=True)
class Readings:
    """`available` bytes can still be taken; `stalled` is the share of time in which somebody waited
    for memory."""

    available: int
    stalled: float = 0.0


class CacheController:
    """Gives memory back when less than `low` bytes are left, until there are twice as many; takes
    it again when there are more than that, and a larger pool would have found more."""

    def __init__(self, pool: PagePool, page_bytes: int, low: int, floor: int) -> None:
        self._pool = pool
        self._page_bytes = page_bytes
        self._low = low
        # Pages that a sequence of full length needs: fewer could serve nobody.
        self._floor = floor
        self._regrets = 0

    def target(self, readings: Readings) -> int:
        """Pages that should be in use."""
        pool, high = self._pool, 2 * self._low
        wanted = pool.available
        regrets, self._regrets = pool.regrets - self._regrets, pool.regrets
        if readings.available < self._low or readings.stalled > STALLED:
            lacking = max(high - readings.available, self._low // 4)
            # Blank pages may never have been touched: they would be growth, and go at once.
            wanted = pool.used + pool.cached - -(-lacking // self._page_bytes)
        elif readings.available > high and wanted < pool.total:
            # Half of what could be taken, so that two who share a machine do not swing.
            room = (readings.available - high) // (2 * self._page_bytes)
            if regrets or pool.free < pool.total // 8:
                wanted += room
        return max(min(wanted, pool.total), min(self._floor, pool.total))
