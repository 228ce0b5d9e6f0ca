"""How the event loop is told that a result is there."""

from __future__ import annotations

import os
from contextlib import suppress


class Bell:
    """A pipe whose reading end wakes the loop. It is rung for each result, behind it: who is woken
    may take the ringer's core at once, and must not ask in vain until that is given back. So a
    result may be found and taken before its byte has come, which is then read when it has."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self._due = 0

    def ring(self) -> None:
        """A result is there."""
        os.write(self.writing, b"\0")

    def answered(self) -> None:
        """A result has been taken."""
        self._due += 1
        self.settle()

    def settle(self) -> None:
        """Read what has come of the bytes of results that were taken."""
        if self._due:
            with suppress(BlockingIOError):
                self._due -= len(os.read(self.reading, self._due))

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)
