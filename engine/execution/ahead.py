"""Memory for pages of the cache before they are written.

A system gives memory to who writes it first, a huge page at a time, and fills it with zeros: two
milliseconds where a virtual machine's host has to find it first, for which every thread of a step
waits. So some is taken ahead, while no step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kernels.backend import Pages

# Between two looks at what the system has left.
GROUP = 256


class Ahead:
    """Takes memory for `count` of `total` pages beyond the highest that was handed out, as long as
    the system has `enough`. Low pages are handed out first, and all again before higher ones."""

    def __init__(
        self, pages: Pages, total: int, count: int, enough: Callable[[], bool] = lambda: True
    ) -> None:
        self._pages = pages
        self._total = total
        self._count = count
        self._enough = enough
        self._used = 0
        self._taken = 0
        self._pieces: Iterator[None] = iter(())

    def use(self, pages: int) -> None:
        """All pages below `pages` may have been handed out."""
        self._used = max(self._used, pages)

    def stop(self) -> None:
        """Take no more: memory was short."""
        self._count = 0
        self._pieces = iter(())

    def rest(self) -> bool:
        """Take a piece; False if there is none to take now."""
        if next(self._pieces, self) is None:
            return True
        first = max(self._taken, self._used)
        last = min(self._total, self._used + self._count, first + GROUP)
        if last <= first or not self._enough():
            return False
        self._pieces = self._pages.populate(first, last)
        self._taken = last
        return True
