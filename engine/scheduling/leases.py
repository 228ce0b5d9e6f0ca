"""Leases: computed pages that stay for whoever is to go on from them, though nothing runs now.

A request that was set aside, or whose tools are being called, comes back with what it had said. Its
pages are free meanwhile, so nobody who runs has to wait for them, but all else that is only cached
is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from engine.scheduling.prefixes import Prefixes
from engine.scheduling.sequence import Sequence
from engine.types import Clock

# Of the pool, at most.
SHARE = 0.5


class Leases:
    """Page names by who is to come back, the oldest first; each lease ends after `seconds`."""

    def __init__(self, prefixes: Prefixes, clock: Clock, seconds: float) -> None:
        self._prefixes = prefixes
        self._pool = prefixes.pool
        self._clock = clock
        self._seconds = seconds
        self._held: OrderedDict[Hashable, tuple[tuple[bytes, ...], float]] = OrderedDict()
        self._pages = 0

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, key: Hashable, sequence: Sequence) -> None:
        """Keep what a sequence has computed for `key`, in place of what that had; nothing for an
        empty one."""
        self._prefixes.publish(sequence)
        names = tuple(sequence.hashes[: sequence.published])
        if key in self._held and len(self._held[key][0]) > len(names):
            names = self._held[key][0]  # it has not come back to all of it yet
        self.drop(key)
        most = int(SHARE * self._pool.available)
        shares = self._prefixes.shares(sequence)
        if not key or not shares or not self._seconds or not 0 < len(names) <= most:
            return
        while self._pages + len(names) > most:
            self.drop(next(iter(self._held)))
        self._held[key] = (names, self._clock.now() + self._seconds)
        self._pages += len(names)
        self._pool.lease(names)

    def came_back(self, sequence: Sequence) -> None:
        """A sequence holds again what was kept for it, or for what it goes on from."""
        if self._held:
            self.drop(sequence)
            self.drop(sequence.request.lease)

    def drop(self, key: Hashable) -> None:
        """End a lease; one that is unknown or has ended is ignored."""
        names, _ = self._held.pop(key, ((), 0.0))
        self._pages -= len(names)
        self._pool.unlease(names)

    def expire(self) -> None:
        """End those whose time has passed, or for which there is no room any more."""
        while self._held:
            key, (_, until) = next(iter(self._held.items()))
            crowded = self._pages > SHARE * self._pool.available
            if until > self._clock.now() and not crowded:
                return
            self.drop(key)

    def clear(self) -> None:
        """End all: what they kept is gone."""
        for key in list(self._held):
            self.drop(key)
