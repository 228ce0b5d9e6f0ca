"""What lies in the cold tier: pages evicted from the pool, the longest unused out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

# Seconds assumed for restoring a page until it has been measured.
ASSUMED_SECONDS = 0.001


class ColdIndex:
    """Names of contents and the slots that they lie in; `slots` of 0 is no cold tier.

    Contents stay when they are restored. `recompute_seconds` is what a page costs to compute.
    """

    def __init__(self, slots: int = 0, recompute_seconds: float = float("inf")) -> None:
        self.slots = slots
        # Called with the names of a content that has gone.
        self.on_drop: Callable[[tuple[bytes, ...]], None] = lambda _: None
        self.hits = 0
        self.stored = 0
        self._recompute_seconds = recompute_seconds
        self._restore_seconds = ASSUMED_SECONDS
        self._by_name: dict[bytes, int] = {}
        self._names: OrderedDict[int, tuple[bytes, ...]] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        # Slots that also have what lay beside the page.
        self._whole: set[int] = set()

    def __len__(self) -> int:
        return len(self._names)

    def put(self, names: tuple[bytes, ...], depth: int) -> int | None:
        """The slot to write a content to; None if it has no place or is there already."""
        if not self.slots or not names:
            return None
        if all(name in self._by_name for name in names):
            self._names.move_to_end(self._by_name[names[0]])
            return None
        if not self._free:
            self._drop(next(iter(self._names)))
        slot = self._free.pop()
        self.stored += 1
        fresh = tuple(name for name in names if name not in self._by_name)
        self._names[slot] = fresh
        self._by_name.update(dict.fromkeys(fresh, slot))
        return slot

    def complete(self, name: bytes, slot: int | None) -> int | None:
        """The slot in which what lies beside a content is still to be put, if there is one: that
        which it has just got, or where it lies."""
        slot = self._by_name.get(name) if slot is None else slot
        if slot is None or slot in self._whole:
            return None
        self._whole.add(slot)
        return slot

    def slot_of_whole(self, name: bytes) -> int | None:
        """Where a content lies with what lay beside it, if that is here, too."""
        slot = self._by_name.get(name)
        return slot if slot in self._whole else None

    def worth_restoring(self, name: bytes) -> bool:
        """Whether the content is here and reading it beats computing it."""
        return name in self._by_name and self._restore_seconds < self._recompute_seconds

    def take(self, name: bytes) -> int | None:
        """The slot of a content, which is used now."""
        slot = self._by_name.get(name)
        if slot is not None:
            self.hits += 1
            self._names.move_to_end(slot)
        return slot

    def observe(self, seconds: float, pages: int) -> None:
        """Learn what a move of a page takes."""
        self._restore_seconds += 0.2 * (seconds / pages - self._restore_seconds)

    def clear(self) -> None:
        """Forget everything: what a failed step wrote cannot be trusted."""
        for slot in list(self._names):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        names = self._names.pop(slot)
        for name in names:
            del self._by_name[name]
        self._free.append(slot)
        self._whole.discard(slot)
        self.on_drop(names)
