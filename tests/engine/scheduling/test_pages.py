"""PagePool: reference counts, the prefix cache, and the order of eviction."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduling.pages import PagePool, chain, chain_root


def hashes(*pages: list[int], namespace: bytes = b"", fingerprint: bytes = b"") -> list[bytes]:
    digests = []
    parent = chain_root(namespace, fingerprint)
    for tokens in pages:
        parent = chain(parent, tokens)
        digests.append(parent)
    return digests


def test_a_released_page_is_found_again_by_its_content() -> None:
    pool = PagePool(4, page_size=2)
    pages = pool.allocate(2)
    assert pages is not None
    digests = hashes([1, 2], [3, 4])
    for page, digest in zip(pages, digests, strict=True):
        pool.publish(page, digest)
    pool.release(pages)
    assert (pool.used, pool.cached, pool.free) == (0, 2, 4)
    assert pool.match(digests) == pages
    assert (pool.used, pool.cached) == (2, 0)


def test_a_match_stops_at_the_first_unknown_page() -> None:
    pool = PagePool(4, page_size=2)
    pages = pool.allocate(2)
    assert pages is not None
    pool.publish(pages[0], hashes([1, 2])[0])
    assert pool.match(hashes([1, 2], [3, 4])) == pages[:1]
    assert pool.match(hashes([9, 9], [3, 4])) == []


def test_the_same_tokens_after_another_prefix_are_another_page() -> None:
    assert hashes([1, 2], [3, 4])[1] != hashes([5, 6], [3, 4])[1]


@pytest.mark.parametrize("other", [{"namespace": b"b"}, {"fingerprint": b"x"}])
def test_namespaces_and_fingerprints_share_nothing(other: dict[str, bytes]) -> None:
    assert hashes([1, 2], namespace=b"a") != hashes([1, 2], **{"namespace": b"a", **other})


def test_namespace_and_fingerprint_cannot_be_confused() -> None:
    assert chain_root(b"ab", b"c") != chain_root(b"a", b"bc")


def test_the_tail_of_the_longest_unused_chain_is_evicted_first() -> None:
    pool = PagePool(4, page_size=1)
    old, new = pool.allocate(2), pool.allocate(2)
    assert old is not None
    assert new is not None
    for page, digest in zip(old + new, hashes([1], [2]) + hashes([3], [4]), strict=True):
        pool.publish(page, digest)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.match(hashes([1], [2])) == [old[0]]
    assert pool.evictions == 1


def test_a_page_without_reusable_content_is_reused_before_a_cached_one() -> None:
    pool = PagePool(2, page_size=1)
    pages = pool.allocate(2)
    assert pages is not None
    pool.publish(pages[0], hashes([1])[0])
    pool.release([pages[0]])
    pool.release([pages[1]])
    assert pool.allocate(1) == [pages[1]]
    assert pool.evictions == 0


def test_too_many_pages_are_refused_and_nothing_changes() -> None:
    pool = PagePool(2, page_size=1)
    assert pool.allocate(3) is None
    assert pool.free == 2


def test_content_published_twice_keeps_its_first_page() -> None:
    pool = PagePool(2, page_size=1)
    pages = pool.allocate(2)
    assert pages is not None
    digest = hashes([1])[0]
    pool.publish(pages[0], digest)
    pool.publish(pages[1], digest)
    assert pool.match([digest]) == [pages[0]]
    pool.release([pages[0]])
    pool.audit([pages])


def test_a_beginning_is_found_until_its_page_is_used_again() -> None:
    pool = PagePool(2, page_size=8)
    pages = pool.allocate(2)
    assert pages is not None
    pool.publish(pages[0], b"first", 0, [b"alike", b"a"])
    pool.publish(pages[1], b"second", 0, [b"another", b"a"])
    pool.release(pages)
    assert [pool.acquire_beginning(name) for name in (b"a", b"another", b"none")] == [0, 1, None]
    pool.audit([pages])
    pool.release(pages)
    pool.allocate(2)
    assert pool.acquire_beginning(b"a") is None
    pool.audit([pages])


def test_audit_notices_a_lost_reference() -> None:
    pool = PagePool(2, page_size=1)
    pages = pool.allocate(1)
    assert pages is not None
    with pytest.raises(AssertionError, match="reference counts"):
        pool.audit([])


class PoolMachine(RuleBasedStateMachine):
    """Random holders that allocate, publish, match and release; audited after every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, page_size=1)
        self.holders: list[tuple[list[int], list[bytes]]] = []
        self.leases: list[list[bytes]] = []

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def acquire(self, tokens: list[int]) -> None:
        digests = hashes(*[[t] for t in tokens])
        matched = self.pool.match(digests)
        fresh = self.pool.allocate(len(tokens) - len(matched))
        if fresh is None:
            self.pool.release(matched)
        else:
            self.holders.append((matched + fresh, digests))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages, digests = data.draw(st.sampled_from(self.holders))
        for page, digest in zip(pages, digests, strict=True):
            self.pool.publish(page, digest)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index)[0])

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def lease(self, tokens: list[int]) -> None:
        self.leases.append(hashes(*[[t] for t in tokens]))
        self.pool.lease(self.leases[-1])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def unlease(self, data: st.DataObject) -> None:
        self.pool.unlease(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule(count=st.integers(1, 6))
    def park(self, count: int) -> None:
        self.pool.park(count)

    @rule(count=st.integers(1, 6))
    def unpark(self, count: int) -> None:
        self.pool.unpark(count)

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @invariant()
    def consistent(self) -> None:
        self.pool.audit([pages for pages, _ in self.holders])
        assert self.pool.used + self.pool.free == self.pool.available


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
