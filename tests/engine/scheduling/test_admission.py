"""Who may enter: lengths, caps, quotas and deadlines; and how room is reckoned."""

from __future__ import annotations

import pytest

from engine.errors import DeadlineExceeded, InvalidRequest, Overloaded
from engine.scheduling import deadlines
from engine.scheduling.admission import Admission, Limits, check_length, share_tokens
from engine.scheduling.cost import Profile
from engine.scheduling.policy import OutputLengths, peak_pages
from engine.scheduling.tenants import Tenant
from engine.types import Request, SamplingParams
from tests.engine.scheduling.test_scheduler import LINEAR, Bench

ROOMY = Limits(1000, 100, 10_000)


def make(prompt: int, *, n: int = 1, **fields: float) -> Request:
    return Request(
        id="new",
        prompt_ids=(0,) * prompt,
        sampling=SamplingParams(n=n),
        max_tokens=10,
        seed=0,
        arrival=0.0,
        **fields,  # type: ignore[arg-type]
    )


def test_length_rules() -> None:
    limits = Limits(context=10, max_waiting=2, max_waiting_tokens=100)
    assert check_length(4, None, limits) == 6
    assert check_length(4, 6, limits) == 6
    for prompt, tokens, param in ((10, None, "prompt"), (4, 7, "max_tokens")):
        with pytest.raises(InvalidRequest) as error:
            check_length(prompt, tokens, limits)
        assert (error.value.param, error.value.code) == (param, "context_length_exceeded")


def test_what_a_tenants_share_can_never_hold_is_refused() -> None:
    room = share_tokens(Tenant(page_share=0.25), pages=8, page_size=4)
    assert room == 8
    assert share_tokens(Tenant(), pages=8, page_size=4) is None
    with pytest.raises(InvalidRequest, match="tenant's share of the KV cache holds 8"):
        check_length(5, 6, ROOMY, room)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR)
    bench.add([1] * 60)
    bench.add([2] * 30)
    with pytest.raises(Overloaded, match="2 sequences"):
        Admission(bench.scheduler, Limits(100, 2, 1000)).admit(make(5), 0.0)
    with pytest.raises(Overloaded, match="150 tokens") as error:
        Admission(bench.scheduler, Limits(100, 9, 140)).admit(make(60), 0.0)
    # 90 rows of prompts, and 128 steps of two: 90 + 256 ms, and half of it is gone by then.
    assert error.value.retry_after == pytest.approx(0.173, abs=0.005)


def test_a_quota_that_is_used_up_names_the_time_it_takes() -> None:
    bench = Bench(pages=64, budget=64)
    bench.scheduler.queue.configure({"t": Tenant(id="t", tokens_per_second=2.0)})
    bench.add([1] * 30, max_tokens=2, tenant="t")
    bench.drain()
    admission = Admission(bench.scheduler, ROOMY)
    with pytest.raises(Overloaded, match="2 tokens/s") as error:
        admission.admit(make(5, tenant="t"), 0.0)  # type: ignore[arg-type]
    assert error.value.retry_after == pytest.approx((32 - 20 + 1) / 2)
    admission.admit(make(5, tenant="t"), 7.0)  # type: ignore[arg-type]
    admission.admit(make(5), 0.0)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR)
    admission = Admission(bench.scheduler, ROOMY)
    admission.admit(make(50, first_token_deadline=0.060), 0.0)
    with pytest.raises(DeadlineExceeded, match="about 50 ms"):
        admission.admit(make(50, first_token_deadline=0.040), 0.0)
    bench.add([1] * 40, deadline=0.050)
    with pytest.raises(Overloaded, match="40 ms come first"):
        admission.admit(make(50, deadline=0.060), 0.0)
    admission.admit(make(50, deadline=0.100), 0.0)


def test_what_is_cached_does_not_count_against_a_deadline() -> None:
    bench = Bench(pages=64, budget=64, profile=LINEAR)
    admission = Admission(bench.scheduler, ROOMY)
    bench.add([0] * 50, max_tokens=1)
    bench.drain()
    # Two tokens are left, of which the last is always computed.
    admission.admit(make(50, first_token_deadline=0.005), 0.0)
    with pytest.raises(DeadlineExceeded):
        admission.admit(make(58, first_token_deadline=0.005), 0.0)
    bench.add([0] * 50, deadline=0.010)
    admission.admit(make(50, deadline=0.015), 0.0)
    bench.add([2] * 40, deadline=0.015)
    with pytest.raises(Overloaded, match="42 ms come first"):
        admission.admit(make(50, deadline=0.015), 0.0)


def test_many_who_wait_are_not_one_long_prompt() -> None:
    """Which would read far more of what is before it."""
    reading = Profile((1, 1001), (0.001, 1.001), 0.0, 0.0, 1e-5)
    bench = Bench(pages=640, budget=64, profile=reading)
    admission = Admission(bench.scheduler, Limits(1000, 100, 100_000))
    bench.add([1] * 50, deadline=9.0)
    one = admission.queue_seconds()
    for number in range(2, 12):
        bench.add([number] * 50, deadline=9.0)
    assert admission.queue_seconds() == pytest.approx(11 * one)
    admission.admit(make(50, deadline=11 * 0.060), 0.0)


def test_those_who_are_too_late_are_named_once() -> None:
    bench = Bench()
    (first,) = bench.add([1], first_token_deadline=5.0, deadline=9.0)
    (second,) = bench.add([2], first_token_deadline=5.0)
    assert list(bench.scheduler.deadlines.passed(4.0)) == []
    first.tokens.append(7)
    assert list(bench.scheduler.deadlines.passed(5.0)) == [second]
    assert list(bench.scheduler.deadlines.passed(5.0)) == []
    assert list(bench.scheduler.deadlines.passed(9.0)) == [first]


def test_deadlines_of_those_who_are_done_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "MANY", 4)
    bench = Bench(pages=64, budget=64, running=8)
    bench.scheduler.deadlines = deadlines.Deadlines()
    for number in range(200):
        bench.add([number], max_tokens=1, deadline=1e9)
        bench.drain()
    assert len(bench.scheduler.deadlines._heap) <= 5


def test_expected_lengths_follow_what_was_seen() -> None:
    lengths = OutputLengths()
    assert lengths.expected(0, 500) == 500
    for length in range(1, 101):
        lengths.record(length)
    assert lengths.expected(0, 500) == 91
    assert lengths.expected(50, 500) == 96
    assert lengths.expected(0, 20) == 20
    assert lengths.expected(90, 500) == 500  # too few were longer to say


def test_the_peak_is_where_somebody_finishes() -> None:
    # All at once: 2+1, then 4 more of the longer one's alone.
    assert peak_pages([(2, 4), (1, 1)]) == 6
    assert peak_pages([(2, 2), (1, 2)]) == 7
    assert peak_pages([]) == 0


def test_a_new_rate_begins_anew_whatever_was_served_before() -> None:
    bench = Bench(pages=64, budget=64)
    bench.add([1] * 30, max_tokens=8, tenant="t")
    bench.drain()
    bench.scheduler.queue.configure({"t": Tenant(id="t", tokens_per_second=2.0)}, 100.0)
    assert bench.scheduler.queue.account("t", 100.0).wait_for_quota(100.0) == 0.0


def test_a_tenant_that_has_its_share_of_the_pages_holds_nobody_back() -> None:
    bench = Bench(pages=16, budget=64, running=8)
    bench.scheduler.queue.configure({"small": Tenant(id="small", page_share=0.25, weight=900.0)})
    for number in range(3):
        bench.add([number] * 5, max_tokens=8, tenant="small")
    bench.step()
    (other,) = bench.add([9], max_tokens=2, tenant="other")
    bench.step()
    assert other.generated > 0


def test_one_tenant_cannot_fill_the_queue_of_all() -> None:
    bench = Bench(pages=64, budget=64)
    for number in range(6):
        bench.add([number] * 5, tenant="flood")
    bench.scheduler.queue.account("guest", 0.0)
    admission = Admission(bench.scheduler, Limits(100, 10, 1000))
    with pytest.raises(Overloaded, match="of this tenant"):
        admission.admit(make(5, tenant="flood"), 0.0)  # type: ignore[arg-type]
    admission.admit(make(5, tenant="guest"), 0.0)  # type: ignore[arg-type]


def test_what_nobody_waits_for_leaves_half_of_the_burst_to_others() -> None:
    bench = Bench(pages=64, budget=64)
    bench.scheduler.queue.configure({"t": Tenant(id="t", tokens_per_second=10.0)}, 0.0)
    account = bench.scheduler.queue.account("t", 0.0)
    bench.add([1] * 60, max_tokens=8, tenant="t", priority=-1)
    # Those that wait are in the way of their like alone.
    assert account.wait_for_quota(0.0) == 0.0
    assert account.wait_for_quota(0.0, patient=True) == pytest.approx(1.1)
    account.take_elsewhere(55)
    assert account.wait_for_quota(0.0) == 0.0
    account.take_elsewhere(55)
    assert account.wait_for_quota(0.0) == pytest.approx(1.1)


def test_what_is_left_to_a_tenant_is_what_is_taken_of_it() -> None:
    bench = Bench(pages=64, budget=64)
    tenants = {name: Tenant(id=name, weight=weight) for name, weight in (("a", 1.0), ("b", 3.0))}
    bench.scheduler.queue.configure(tenants, 0.0)
    bench.scheduler.queue.account("b", 0.0)
    admission = Admission(bench.scheduler, Limits(1000, 16, 10_000))
    taken = 0
    for _ in range(16):
        left = admission.allowance("a", 0.0).requests_left
        try:
            admission.admit(make(2, tenant="a"), 0.0)  # type: ignore[arg-type]
        except Overloaded:
            assert left == 0
            break
        assert left > 0
        bench.add([1, 2], tenant="a")
        taken += 1
    assert taken == 8
