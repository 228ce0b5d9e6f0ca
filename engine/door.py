"""Whether requests are taken: all, none but those that go on from what runs, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineClosed


class Door:
    """Open until a drain closes it; work of several requests may hold it open for the rest of its
    own until it is shut."""

    def __init__(self) -> None:
        self.closing = False
        self._shut = False
        self._held: set[str] = set()

    @property
    def is_held(self) -> bool:
        """Whether somebody has not ended whose next request would be taken."""
        return bool(self._held) and not self._shut

    @contextmanager
    def hold(self, lease: str) -> Iterator[None]:
        """Requests of this lease are taken while a drain waits, which it does until this ends."""
        self._held.add(lease)
        try:
            yield
        finally:
            self._held.discard(lease)

    def close(self, *, shut: bool = False) -> None:
        """Take nothing new; `shut` takes nothing at all."""
        self.closing, self._shut = True, self._shut or shut

    def check(self, lease: str) -> None:
        """Raises EngineClosed if a request of this lease ("" for none) is not taken."""
        if self.closing and (self._shut or lease not in self._held):
            raise EngineClosed("the server is shutting down and takes no new requests")
