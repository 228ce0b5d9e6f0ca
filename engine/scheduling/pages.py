"""KV pages and the prefix cache, as one structure.

A page's content is named by a hash chain, so a prefix is found by looking up its pages' hashes. A
freed page keeps its names until it is reused: the free pages, in the order of eviction, are the
cache. The idea of hashing full pages comes from vLLM's prefix caching (arXiv 2309.06180). The page
that a prompt ends in has a name too, so that whoever repeats the prompt can copy it; and what pages
begin with has names of its own, for prompts that go the same way for a while.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

from engine.config import PolicyName
from engine.scheduling.eviction import Adaptive, Order, Record
from engine.scheduling.window_pages import NONE, WindowPages

# Pages that are taken out of use together.
GROUP = 8


def chain_root(namespace: bytes, fingerprint: bytes) -> bytes:
    """The hash before the first page. Different tenants or weight formats never share a page."""
    sized = len(namespace).to_bytes(4, "little")
    return blake2b(sized + namespace + fingerprint, digest_size=16).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one page of `tokens` that follows `parent`; the last one may be short."""
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()


class PagePool:
    """Reference-counted pages. A page is held, or free, or parked (its memory given back); a free
    one may still be cached. Where some layers see a window only, they keep theirs in `windows`."""

    def __init__(
        self,
        pages: int,
        page_size: int,
        policy: PolicyName = "lru",
        windows: WindowPages | None = None,
    ) -> None:
        self.total = pages
        self.page_size = page_size
        self.windows = windows
        self.evictions = 0
        # Cached pages that were forgotten because the machine ran short of memory.
        self.surrendered = 0
        # Called with (page, names, depth) when content that can still be found is about to go.
        self.on_evict: Callable[[int, tuple[bytes, ...], int], object] = lambda *_: None
        self._references = [0] * pages
        self._names: list[tuple[bytes, ...]] = [()] * pages
        self._records = [Record() for _ in range(pages)]
        self._by_name: dict[bytes, int] = {}
        # The same for what a page's content begins with; whoever goes on otherwise copies it.
        self._beginnings: dict[int, tuple[bytes, ...]] = {}
        self._by_beginning: dict[bytes, int] = {}
        # Free pages without content; low numbers are handed out first.
        self._blank = list(range(pages - 1, -1, -1))
        self._adaptive = Adaptive(pages) if policy == "adaptive" else None
        self._order = Order("lru" if policy == "adaptive" else policy)
        # Free pages that somebody is to come back for, the longest unused first; and how many
        # leases a name has.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._leases: dict[bytes, int] = {}
        self._parked: set[int] = set()
        # Names that were forgotten lately, as many as a pool holds: what is asked for again would
        # have been found in a pool of up to twice the size.
        self.regrets = 0
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._clock = 0
        if windows is not None:
            windows.spared = self._kept.__contains__

    @property
    def free(self) -> int:
        """Pages that can be allocated, cached ones included."""
        return len(self._blank) + self.cached

    @property
    def spare(self) -> int:
        """Pages that can be allocated with a window page beside them, where there are such."""
        return self.free if self.windows is None else min(self.free, self.windows.free)

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self.total - len(self._parked) - self.free

    @property
    def usage(self) -> float:
        """The share of the pages, or of window pages if it is larger, that sequences hold."""
        windows = self.windows
        beside = windows.used / windows.total if windows is not None else 0.0
        return max(self.used / self.total, beside)

    @property
    def cached(self) -> int:
        """Free pages whose content can still be found."""
        return len(self._order) + len(self._kept)

    @property
    def kept(self) -> int:
        """Those of the cached pages that are forgotten last."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages that are not parked."""
        return self.total - len(self._parked)

    def holds(self, digest: bytes) -> bool:
        """Whether content of this name is here."""
        return digest in self._by_name

    def is_whole(self, digest: bytes) -> bool:
        """Whether content of this name is here with what all layers keep of it."""
        page = self._by_name.get(digest)
        return page is not None and self._is_whole(page)

    def is_held(self, digest: bytes) -> bool:
        """Whether content of this name is here, in a page that is in use."""
        page = self._by_name.get(digest)
        return page is not None and self._references[page] > 0

    def is_cached(self, page: int) -> bool:
        """Whether a page is free and its content can still be found."""
        return page in self._order or page in self._kept

    def acquire(self, digest: bytes) -> int | None:
        """The page of this name with a reference taken, or None."""
        page = self._by_name.get(digest)
        if page is None:
            if digest in self._ghosts:
                del self._ghosts[digest]
                self.regrets += 1
            return None
        self._hold(page)
        if self._adaptive is not None:
            self._follow(digest, self._records[page].depth)
        return page

    def acquire_beginning(self, digest: bytes) -> int | None:
        """A page whose content begins as this name says, with a reference taken, or None."""
        page = self._by_beginning.get(digest)
        if page is not None:
            self._hold(page)
        return page

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of pages with these names, each with a reference taken."""
        matched = []
        for digest in hashes:
            page = self.acquire(digest)
            if page is None:
                break
            matched.append(page)
        return matched

    def allocate(self, count: int, *, windowed: bool = True) -> list[int] | None:
        """`count` pages, forgetting the cached content that is worth least; None if too few. What
        lies beside them is attached as well, if it is wanted."""
        if count > (self.spare if windowed else self.free):
            return None
        pages = []
        for _ in range(count):
            page = self._blank.pop() if self._blank else self._evict()
            self._references[page] = 1
            pages.append(page)
        if windowed and self.windows is not None:
            self.windows.attach(pages)
        return pages

    def publish(
        self, page: int, digest: bytes, depth: int = 0, beginnings: Sequence[bytes] = ()
    ) -> None:
        """Make a held page's content findable, once it has been computed, and what it begins with;
        a page can have several names. If the same content is already published elsewhere, that page
        stays the one found, unless it has lost what lay beside it.
        """
        assert self._references[page] > 0
        other = self._by_name.get(digest)
        if other is not None:
            if self._is_whole(other) or not self._is_whole(page):
                return
            self._take_name(other, digest)
        if not self._names[page]:
            self._records[page] = Record(depth=depth, born=self._tick())
            if self._adaptive is not None:
                self._follow(digest, depth)
        self._by_name[digest] = page
        self._names[page] += (digest,)
        fresh = tuple(name for name in beginnings if name not in self._by_beginning)
        if fresh:
            self._beginnings[page] = self._beginnings.get(page, ()) + fresh
            self._by_beginning.update(dict.fromkeys(fresh, page))

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference to each page. Later pages of a chain are reused first, since a
        page is useless without those before it."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0
            if self._references[page] == 0:
                if self._names[page]:
                    record = self._records[page]
                    record.used = self._tick()
                    self._put_back(page)
                else:
                    self._make_blank(page)

    def lease(self, names: Iterable[bytes]) -> None:
        """Forget content of these names after all other, wherever it lies."""
        for name in names:
            self._leases[name] = self._leases.get(name, 0) + 1
            self._sort_in(name)

    def unlease(self, names: Iterable[bytes]) -> None:
        """Take back one `lease` of each."""
        for name in names:
            self._leases[name] -= 1
            if not self._leases[name]:
                del self._leases[name]
                self._sort_in(name)

    def park(self, count: int) -> list[int]:
        """Take at most `count` free pages out of use, in neighbouring groups, since only those give
        memory back; what they held is forgotten, the least and the longest unused first."""
        blank = set(self._blank)
        groups = []
        for first in range(0, self.total, GROUP):
            group = range(first, min(first + GROUP, self.total))
            cached = [page for page in group if self.is_cached(page)]
            if len(cached) + sum(page in blank for page in group) == len(group):
                used = max((self._records[page].used for page in cached), default=0)
                kept = any(page in self._kept for page in cached)
                groups.append((bool(cached), kept, used, -first, group))
        parked: list[int] = []
        for *_, group in sorted(groups, key=lambda g: g[:4]):
            if len(parked) + len(group) > count:
                continue
            for page in group:
                if self.is_cached(page):
                    self._take_out(page)
                    self._forget(page)
                    self.surrendered += 1
            parked += group
        self._parked.update(parked)
        self._blank = [page for page in self._blank if page not in self._parked]
        return parked

    def unpark(self, count: int) -> list[int]:
        """Take up to `count` parked pages into use again, lowest first."""
        pages = sorted(self._parked)[:count]
        self._parked.difference_update(pages)
        self._blank = sorted([*self._blank, *pages], reverse=True)
        return pages

    def forget(self) -> None:
        """Make every free page blank, since nothing lies in it any more."""
        for page in range(self.total):
            if self.is_cached(page):
                self._take_out(page)
                for digest in self._names[page]:
                    del self._by_name[digest]
                self._names[page] = ()
                self._make_blank(page)
        self._blank.sort(reverse=True)

    def audit(self, holders: Iterable[Sequence[int]]) -> None:
        """Check every invariant against the page lists of all holders; for tests.

        Raises AssertionError.
        """
        expected = [0] * self.total
        for pages in holders:
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            for page in pages:
                expected[page] += 1
        assert self._references == expected, "reference counts differ from what is held"
        free = set(self._blank) | {p for p in range(self.total) if self.is_cached(p)}
        assert len(free) == self.free, "a page is free twice"
        assert not free & self._parked, "a parked page is free"
        unused = {page for page, count in enumerate(expected) if count == 0}
        assert free | self._parked == unused, "the free pages differ from the unreferenced ones"
        for digest, page in self._by_name.items():
            assert digest in self._names[page], "a name leads to a page with others"
        for page in (*self._blank, *self._parked):
            assert not self._names[page], "a blank page has a name"
            assert page not in self._beginnings, "a blank page begins with something"
        assert sum(map(len, self._names)) == len(self._by_name), "a name is lost"
        found = {name: page for page, names in self._beginnings.items() for name in names}
        assert found == self._by_beginning, "a beginning is lost"
        leased = {page for name, page in self._by_name.items() if name in self._leases}
        assert set(self._kept) == leased & unused, "the kept pages differ from the leased ones"
        assert not any(page in self._order for page in self._kept), "a kept page may go early"

    def _hold(self, page: int) -> None:
        """Take a reference to a page with content."""
        if self._references[page] == 0:
            self._take_out(page)
        self._references[page] += 1
        self._records[page].hits += 1
        self._records[page].visited = True

    def _evict(self) -> int:
        page = self._order.pop() if len(self._order) else self._kept.popitem(last=False)[0]
        assert isinstance(page, int)
        self.evictions += 1
        self._forget(page)
        return page

    def _put_back(self, page: int) -> None:
        """A free page with content joins those that can be evicted."""
        if self._leases and any(name in self._leases for name in self._names[page]):
            self._kept[page] = None
        else:
            self._order.add(page, self._records[page])

    def _take_out(self, page: int) -> None:
        """A free page with content is none of those any more."""
        if page in self._kept:
            del self._kept[page]
        else:
            self._order.remove(page)

    def _sort_in(self, name: bytes) -> None:
        """A name's leases have changed."""
        page = self._by_name.get(name)
        if page is not None and self.is_cached(page):
            self._take_out(page)
            self._put_back(page)

    def _is_whole(self, page: int) -> bool:
        return self.windows is None or self.windows.beside(page) != NONE

    def _take_name(self, page: int, digest: bytes) -> None:
        """A page is not the one found by this name any more."""
        cached = self.is_cached(page)
        if cached:
            self._take_out(page)
        del self._by_name[digest]
        self._names[page] = tuple(name for name in self._names[page] if name != digest)
        if cached and self._names[page]:
            self._put_back(page)
        elif cached:
            self._make_blank(page)

    def _make_blank(self, page: int) -> None:
        """A free page has no content any more."""
        self._forget_beginnings(page)
        self._blank.append(page)
        if self.windows is not None:
            self.windows.detach(page)

    def _forget(self, page: int) -> None:
        names = self._names[page]
        self.on_evict(page, names, self._records[page].depth)
        if self.windows is not None:
            self.windows.detach(page)
        for digest in names:
            del self._by_name[digest]
            self._ghosts[digest] = None
        self._forget_beginnings(page)
        while len(self._ghosts) > self.total:
            self._ghosts.popitem(last=False)
        self._names[page] = ()

    def _forget_beginnings(self, page: int) -> None:
        for name in self._beginnings.pop(page, ()):
            del self._by_beginning[name]

    def _follow(self, digest: bytes, depth: int) -> None:
        assert self._adaptive is not None
        self._adaptive.access(digest, depth)
        self._order.follow(self._adaptive.choice)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
