"""Which cached page goes first: key functions over one ordered structure.

A policy is a function from a page's record to a key; the page with the smallest key is evicted.
LRU and LFU are the textbook ones; SIEVE is Zhang et al.'s (NSDI 2024), its hand told by rounds;
`cost` is Greedy-Dual-Size-Frequency (Cherkasova, HPL-98-69) with the recompute time that a page
saves in place of a file's cost, less with its depth, since it is useless without those before it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass

Key = tuple[float, ...]

# One content in so many is followed by the shadow caches of a large pool.
SAMPLING = 8
# Accesses between two choices of the adaptive policy, and how much better a rival has to be.
PERIOD = 512
ADVANTAGE = 1.02


@dataclass(slots=True)
class Record:
    """What is known about a cached content. `depth` counts the pages before it in its chain."""

    depth: int = 0
    hits: int = 0
    born: int = 0
    used: int = 0
    visited: bool = False
    round: int = 0
    floor: float = 0.0


def lru(record: Record) -> Key:
    """The longest unused first."""
    return (record.used,)


def lfu(record: Record) -> Key:
    """The least often used first, then the longest unused."""
    return (record.hits, record.used)


def sieve(record: Record) -> Key:
    """In order of arrival; who was used since the hand passed is spared once (see `Order.pop`)."""
    return (record.round, record.born)


def cost(record: Record) -> Key:
    """The least recompute time saved first: uses times cost, above what has been evicted so far."""
    worth = (1 + record.hits) / (1 + record.depth) ** 0.5
    return (record.floor + worth, record.used)


POLICIES: dict[str, Callable[[Record], Key]] = {
    "lru": lru,
    "lfu": lfu,
    "sieve": sieve,
    "cost": cost,
}


class Order:
    """Items in the order of eviction: a heap whose outdated entries are skipped.

    `add` and `pop` are logarithmic, `remove` constant.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._key = POLICIES[policy]
        self._heap: list[tuple[Key, int, Hashable]] = []
        self._entries: dict[Hashable, tuple[int, Record]] = {}
        self._count = 0
        self._floor = 0.0
        # How often SIEVE's hand has gone round: what comes now is met in this round.
        self._round = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Hashable) -> bool:
        return item in self._entries

    def add(self, item: Hashable, record: Record) -> None:
        """Put an item in its place; its record must not change while it is here."""
        record.floor = self._floor
        record.round = max(record.round, self._round)
        self._push(item, record)

    def remove(self, item: Hashable) -> None:
        """Take an item out."""
        del self._entries[item]
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._rebuild()

    def pop(self) -> Hashable:
        """Take out the item that is worth least."""
        while True:
            key, count, item = heapq.heappop(self._heap)
            entry = self._entries.get(item)
            if entry is None or entry[0] != count:
                continue
            record = entry[1]
            self._round = max(self._round, record.round)
            if self.policy == "sieve" and record.visited:
                record.visited = False
                record.round += 1
                self._push(item, record)
                continue
            del self._entries[item]
            if self.policy == "cost":
                self._floor = max(self._floor, key[0])
            return item

    def follow(self, policy: str) -> None:
        """Go on by another policy."""
        if policy != self.policy:
            self.policy, self._key = policy, POLICIES[policy]
            self._rebuild()

    def _push(self, item: Hashable, record: Record) -> None:
        self._count += 1
        self._entries[item] = (self._count, record)
        heapq.heappush(self._heap, (self._key(record), self._count, item))

    def _rebuild(self) -> None:
        self._heap = [(self._key(r), count, item) for item, (count, r) in self._entries.items()]
        heapq.heapify(self._heap)


class Shadow:
    """A cache of names alone, to learn how often a policy would have hit."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.score = 0.0
        self._order = Order(policy)
        self._capacity = capacity
        self._records: dict[bytes, Record] = {}
        self._clock = 0

    def access(self, digest: bytes, depth: int) -> bool:
        """Use a content; returns whether it was there."""
        self._clock += 1
        record = self._records.get(digest)
        found = record is not None
        if record is None:
            if len(self._records) >= self._capacity:
                gone = self._order.pop()
                assert isinstance(gone, bytes)
                del self._records[gone]
            record = self._records[digest] = Record(depth=depth, born=self._clock)
        else:
            self._order.remove(digest)
            record.hits += 1
            record.visited = True
        record.used = self._clock
        self._order.add(digest, record)
        self.score += found
        return found


class Adaptive:
    """Follows whichever policy's shadow cache has hit most lately."""

    def __init__(self, capacity: int) -> None:
        self._sampling = SAMPLING if capacity >= 64 * SAMPLING else 1
        capacity = max(1, capacity // self._sampling)
        self._shadows = {name: Shadow(name, capacity) for name in POLICIES}
        self._accesses = 0
        self.choice = "lru"

    def access(self, digest: bytes, depth: int) -> None:
        """Use a content in every shadow cache, and choose again now and then."""
        if digest[0] % self._sampling:
            return
        for shadow in self._shadows.values():
            shadow.access(digest, depth)
        self._accesses += 1
        if self._accesses % PERIOD == 0:
            best = max(self._shadows, key=lambda name: self._shadows[name].score)
            if self._shadows[best].score > ADVANTAGE * self._shadows[self.choice].score:
                self.choice = best
            for shadow in self._shadows.values():
                shadow.score *= 0.5  # lately counts more
