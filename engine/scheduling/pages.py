"""KV pages and the prefix cache, as one structure.

A page's content is named by a hash chain, so a prefix is found by looking up its pages' hashes. A
freed page keeps its hash until it is reused: the free list, in order of release, is the cache.
The idea of hashing full pages comes from vLLM's prefix caching (arXiv 2309.06180).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def chain_root(namespace: bytes, fingerprint: bytes) -> bytes:
    """The hash before the first page. Different tenants or weight formats never share a page."""
    sized = len(namespace).to_bytes(4, "little")
    return blake2b(sized + namespace + fingerprint, digest_size=16).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one full page of `tokens` that follows `parent`."""
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()


class PagePool:
    """Reference-counted pages. A page is held, or free; a free one may still be cached."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.total = pages
        self.page_size = page_size
        self.evictions = 0
        self._references = [0] * pages
        self._hashes: list[bytes | None] = [None] * pages
        self._by_hash: dict[bytes, int] = {}
        # Oldest release first: the order in which pages are reused.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self._cached = 0

    @property
    def free(self) -> int:
        """Pages that can be allocated, cached ones included."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self.total - len(self._free)

    @property
    def cached(self) -> int:
        """Free pages whose content can still be found."""
        return self._cached

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of published pages for `hashes`, each with a reference taken."""
        matched = []
        for digest in hashes:
            page = self._by_hash.get(digest)
            if page is None:
                break
            if self._references[page] == 0:
                del self._free[page]
                self._cached -= 1
            self._references[page] += 1
            matched.append(page)
        return matched

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, forgetting the longest unused cached content; None if too few."""
        if count > len(self._free):
            return None
        pages = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            digest = self._hashes[page]
            if digest is not None:
                del self._by_hash[digest]
                self._hashes[page] = None
                self._cached -= 1
                self.evictions += 1
            self._references[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Make a held page's content findable, once it has been computed.

        If the same content is already published elsewhere, that page stays the findable one.
        """
        assert self._references[page] > 0
        if digest not in self._by_hash and self._hashes[page] is None:
            self._by_hash[digest] = page
            self._hashes[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference to each page. Later pages of a chain are reused first, since a
        page is useless without those before it."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0
            if self._references[page] == 0:
                self._free[page] = None
                if self._hashes[page] is None:
                    # Nothing is lost by reusing it at once.
                    self._free.move_to_end(page, last=False)
                else:
                    self._cached += 1

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
        free = {page for page, count in enumerate(expected) if count == 0}
        assert set(self._free) == free, "the free list differs from the unreferenced pages"
        for digest, page in self._by_hash.items():
            assert self._hashes[page] == digest, "a hash leads to a page with another"
        cached = sum(1 for page in free if self._hashes[page] is not None)
        assert self._cached == cached, "the count of cached pages is off"
        assert sum(h is not None for h in self._hashes) == len(self._by_hash), "a hash is lost"
