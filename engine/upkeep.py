"""Looks after the memory while the engine serves: a smaller pool rather than a killed process."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.scheduling.controller import CacheController, Readings
from engine.scheduling.scheduler import Scheduler

logger = logging.getLogger("ryzanstein.engine")


class Upkeep:
    """Call it now and then; `read` says how much memory is left, or None if nobody knows."""

    def __init__(
        self,
        scheduler: Scheduler,
        controller: CacheController,
        read: Callable[[], Readings | None],
    ) -> None:
        self._scheduler = scheduler
        self._controller = controller
        self._read = read
        self._complaint = ""

    def __call__(self) -> bool:
        """Adjust the pool; True if memory waits to be given back, which takes a step."""
        try:
            readings = self._read()
        except (OSError, ValueError, LookupError) as error:
            # The system's files can change under us; serving does not depend on them.
            if self._complaint != str(error):
                self._complaint = str(error)
                logger.error("cannot tell how much memory is left: %s", error)
            return False
        if readings is None:
            return False
        pool = self._scheduler.pool
        target = self._controller.target(readings)
        if target == pool.available:
            return False
        change = self._scheduler.resize(target)
        if change:
            logger.info(
                "KV cache %s to %d of %d pages: %d MB of memory are left",
                "shrinks" if change < 0 else "grows",
                pool.available,
                pool.total,
                readings.available // 2**20,
            )
        return change < 0
