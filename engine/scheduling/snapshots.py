"""Snapshots: what recurrent layers remembered where pages end, to go on from.

Keys and values can be shared up to any token, a state only where it was kept. Which are follows
Marconi (arXiv 2411.19379): where a prompt's last page ends, since who comes back has all of it;
where it leaves what others had computed, since more may have the same beginning; and for everybody
who runs the place that it has last come to, which moves on with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A state that a step puts at `place`: that behind the first `pages` pages of a sequence. It
    stays for others if it is `wanted`; else until the sequence keeps its next."""

    pages: int
    place: int
    wanted: bool


class Snapshots:
    """Places of states by the name of the page that they lie behind; the longest unused goes first.

    There are `count` places, numbered from `first` on; those before are of who runs, by slot.
    """

    def __init__(self, first: int, count: int) -> None:
        self.total = count
        self._free = list(range(first + count - 1, first - 1, -1))
        self._by_name: OrderedDict[bytes, int] = OrderedDict()
        # Those that go when who kept them keeps the next.
        self._passing: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: bytes) -> bool:
        return name in self._by_name

    def place(self) -> int | None:
        """A place to keep a state at; None if all are on their way to be filled."""
        if not self._free and self._by_name:
            self.drop([next(iter(self._by_name))])
        return self._free.pop() if self._free else None

    def put(self, name: bytes, place: int, *, wanted: bool) -> None:
        """A state lies at `place` now. If there is one of this name, it is the same."""
        if name in self._by_name:
            self.give_back(place)
        else:
            self._by_name[name] = place
            if not wanted:
                self._passing.add(name)
        if wanted:
            self._passing.discard(name)

    def give_back(self, place: int) -> None:
        """Nothing was kept there."""
        self._free.append(place)

    def use(self, name: bytes) -> int:
        """The place of a state that somebody goes on from."""
        self._by_name.move_to_end(name)
        self._passing.discard(name)
        return self._by_name[name]

    def pass_by(self, name: bytes) -> None:
        """Who kept it has come further: it goes, if nobody else has used it."""
        if name in self._passing:
            self.drop([name])

    def drop(self, names: Iterable[bytes]) -> None:
        """Forget what lies behind pages that are gone."""
        for name in names:
            if (place := self._by_name.pop(name, None)) is not None:
                self._passing.discard(name)
                self._free.append(place)

    def audit(self, filling: Iterable[int]) -> None:
        """Check that every place is free, found by a name or `filling`; for tests. Raises
        AssertionError."""
        places = [*self._free, *self._by_name.values(), *filling]
        assert len(places) == len(set(places)) == self.total, "a place is lost or used twice"
        assert self._passing <= set(self._by_name), "what is gone cannot be passed by"

    def clear(self) -> None:
        """Forget all."""
        self.drop(list(self._by_name))
