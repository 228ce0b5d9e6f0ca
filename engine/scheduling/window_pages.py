"""Pages of layers that attend to a sliding window alone, which need not keep the whole context.

What such layers keep of a page of the pool lies in a window page beside it, held by sequences whose
window still reaches it. One that nobody holds stays, so that others can begin there, until its
place is needed. That layers differ in what they have to keep is Jenga's observation (arXiv
2503.18292), which has one pool for all; here each kind has its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

NONE = -1


def least_window_pages(window: int, batch_tokens: int, page_size: int) -> int:
    """With how many a sequence alone gets on: its window, a step in flight, and the next."""
    return -(-(window - 1 + 2 * batch_tokens) // page_size) + 2


def most_window_pages(window: int, page_size: int) -> int:
    """How many a sequence that decodes holds at most."""
    return -(-(window - 1) // page_size) + 1


class WindowPages:
    """Reference-counted window pages, each beside one page of a pool of `pages`; a token sees the
    `window` positions that end with its own, and a step takes up to `step_tokens`."""

    def __init__(
        self, total: int, window: int, page_size: int, pages: int, step_tokens: int = 1
    ) -> None:
        self.total = total
        self.window = window
        self.page_size = page_size
        # Pages that two steps fill, one in flight and the next.
        self.in_steps = -(-2 * step_tokens // page_size)
        # Unheld ones that were given up because others needed the place.
        self.evictions = 0
        # Whether what lies beside a page should go after what lies beside others.
        self.spared: Callable[[int], bool] = lambda _: False
        self._references = [0] * total
        # By window page, and by page.
        self._page = [NONE] * total
        self._beside = [NONE] * pages
        self._blank = list(range(total - 1, -1, -1))
        # Those that nobody holds, the longest unheld first.
        self._unheld: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Window pages that can be attached to other pages."""
        return len(self._blank) + len(self._unheld)

    @property
    def used(self) -> int:
        """Window pages that some sequence holds."""
        return self.total - self.free

    @property
    def most(self) -> int:
        """See `most_window_pages`."""
        return most_window_pages(self.window, self.page_size)

    def first(self, position: int) -> int:
        """The number of the first page that a token at `position` sees."""
        return max(0, position - self.window + 1) // self.page_size

    def beside(self, page: int) -> int:
        """The window page beside a page, or NONE."""
        return self._beside[page]

    def attach(self, pages: Sequence[int]) -> list[int]:
        """A window page beside each, with a reference taken. The caller has seen that they are
        `free`."""
        attached = []
        for page in pages:
            assert self._beside[page] == NONE, "a page has two window pages"
            window_page = self._blank.pop() if self._blank else self._evict()
            self._references[window_page] = 1
            self._page[window_page], self._beside[page] = page, window_page
            attached.append(window_page)
        return attached

    def hold(self, page: int) -> int:
        """The window page beside a page, with a reference taken."""
        window_page = self._beside[page]
        self._unheld.pop(window_page, None)
        self._references[window_page] += 1
        return window_page

    def let_go(self, window_pages: Iterable[int]) -> None:
        """Give up one reference to each: no later step of the holder reads them."""
        for window_page in window_pages:
            self._references[window_page] -= 1
            assert self._references[window_page] >= 0
            if not self._references[window_page]:
                self._unheld[window_page] = None

    def detach(self, page: int) -> None:
        """A page is blank: what lies beside it means nothing any more."""
        window_page = self._beside[page]
        if window_page != NONE:
            del self._unheld[window_page]
            self._part(window_page)
            self._blank.append(window_page)

    def audit(self, holders: Iterable[Sequence[int]]) -> None:
        """Check every invariant against what all holders have; for tests. Raises AssertionError."""
        expected = [0] * self.total
        for window_pages in holders:
            for window_page in window_pages:
                expected[window_page] += 1
        assert self._references == expected, "window references differ from what is held"
        apart = [n for n in range(self.total) if self._page[n] == NONE]
        assert sorted(self._blank) == apart, "a window page is lost"
        unheld = {n for n, count in enumerate(expected) if not count} - set(apart)
        assert set(self._unheld) == unheld, "the unheld window pages differ from the unreferenced"
        for window_page, page in enumerate(self._page):
            assert page == NONE or self._beside[page] == window_page, "a window page is astray"
        assert sum(n != NONE for n in self._beside) == self.total - len(apart)

    def _evict(self) -> int:
        """The longest unheld; those that are spared go behind all others."""
        unheld = self._unheld
        for _ in range(len(unheld)):
            window_page = next(iter(unheld))
            if not self.spared(self._page[window_page]):
                break
            unheld.move_to_end(window_page)
        window_page, _ = unheld.popitem(last=False)
        self.evictions += 1
        self._part(window_page)
        return window_page

    def _part(self, window_page: int) -> None:
        self._beside[self._page[window_page]] = NONE
        self._page[window_page] = NONE
