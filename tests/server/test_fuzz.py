"""A short run of the fuzzer; `python -m tests.server.fuzz` is the long one."""

from __future__ import annotations

from tests.server.fuzz import check_nothing_is_left, fuzz, serving


async def test_two_thousand_mutated_bodies_and_messages_leave_nothing_behind() -> None:
    with serving() as server:
        before = server.held()
        seen = await fuzz(server, 2000, seed=1)
        check_nothing_is_left(server, before)
    assert seen["200"] > 50, "most were refused; the mutations are too wild"
    assert seen["400"] > 50
