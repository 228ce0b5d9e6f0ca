"""Whether requests are taken: all, none but those that go on from what runs, or none."""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import EngineClosed


class Door:
    """Open until a drain closes it; work of several requests may hold it open for the rest of its
    own until it is shut."""

    def __init__(self) -> None:
        self.closing = False
        self._shut = False
        self._held: dict[str, Callable[[], bool]] = {}

    @property
    def is_held(self) -> bool:
        """Whether somebody is worth waiting for: who has not ended, and moves."""
        return not self._shut and any(moves() for moves in self._held.values())

    def hold(self, lease: str, moves: Callable[[], bool]) -> None:
        """Take this lease's requests while a drain waits, until `release`; it waits as long as
        `moves` says."""
        self._held[lease] = moves

    def release(self, lease: str) -> None:
        """The lease's last request has ended; others are ignored."""
        self._held.pop(lease, None)

    def close(self, *, shut: bool = False) -> None:
        """Take nothing new; `shut` takes nothing at all."""
        self.closing, self._shut = True, self._shut or shut

    def check(self, lease: str) -> None:
        """Raises EngineClosed if a request of this lease ("" for none) is not taken."""
        if self.closing and (self._shut or lease not in self._held):
            raise EngineClosed("the server is shutting down and takes no new requests")
