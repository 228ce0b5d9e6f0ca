"""Tenants in the scheduler: shares, caps, and service that is fair between them."""

from __future__ import annotations

from engine.scheduling.sequence import Sequence
from engine.scheduling.tenants import Tenant
from tests.engine.scheduling.bench import Bench, generated
from tests.mock import continuation


def test_a_tenant_below_its_share_gets_a_slot_from_one_above() -> None:
    bench = Bench(pages=64, budget=64, running=4)
    flood = [bench.add([i], max_tokens=20, tenant="flood")[0] for i in range(8)]
    bench.step()
    (guest,) = bench.add([99], max_tokens=3, tenant="guest")
    for _ in range(3):
        bench.step()
    assert guest.generated > 0
    bench.drain()
    assert [generated(s) for s in flood] == [continuation([i], 20) for i in range(8)]


def test_a_tenants_cap_holds_its_own_requests_back_only() -> None:
    bench = Bench(pages=64, budget=64, running=8)
    bench.scheduler.queue.configure({"small": Tenant(id="small", max_running=2)})
    for number in range(5):
        bench.add([number], tenant="small")
    (other,) = bench.add([9], tenant="other")
    bench.step()
    running = [s.request.tenant for s in bench.scheduler.running]
    assert sorted(running) == ["other", "small", "small"]
    assert other.generated == 1
    bench.drain()


def test_a_tenants_share_of_the_pages_is_all_it_gets() -> None:
    bench = Bench(pages=16, budget=64, running=8)
    bench.scheduler.queue.configure({"small": Tenant(id="small", page_share=0.25)})
    for number in range(4):
        bench.add([number] * 5, max_tokens=3, tenant="small")
    bench.step()
    assert len(bench.scheduler.running) == 2
    bench.drain()


def test_service_is_shared_by_weight() -> None:
    bench = Bench(pages=400, budget=32, running=4)
    bench.scheduler.queue.configure({"big": Tenant(id="big", weight=3.0)})
    sequences = {
        name: [bench.add([n, i], max_tokens=8, tenant=name)[0] for i in range(60)]
        for n, name in enumerate(("big", "little"))
    }
    for _ in range(120):
        bench.step()
    done = {name: sum(s.generated for s in them) for name, them in sequences.items()}
    assert 2.5 < done["big"] / done["little"] < 3.5


def test_the_turn_of_a_tenant_is_passed_over_only_within_the_bound_of_fairness() -> None:
    """One that has little running may go before one whose prompts are under way, but not when the
    service of the two could then differ by more than the pool holds."""
    for ahead, admitted in ((0.0, True), (2.0 * 64 * 4 - 60, False)):
        bench = Bench(pages=64, budget=8, running=4, max_prefilling=1)
        bench.add([1] * 40, max_tokens=2, tenant="due")
        bench.add([2] * 40, max_tokens=2, tenant="due")
        bench.add([3] * 40, max_tokens=2, tenant="due")
        (guest,) = bench.add([4] * 20, max_tokens=20, tenant="guest")
        guest.account.counter += ahead + 1
        bench.step()
        assert [s.request.tenant for s in bench.scheduler.running].count("due") == 2
        assert (guest in bench.scheduler.running) is admitted
        bench.drain()


def test_a_prompt_is_paid_for_once_whatever_happens_to_it() -> None:
    for interrupt in (False, True):
        bench = Bench(pages=64, budget=8, running=4, prefix_caching=False)
        (sequence,) = bench.add(list(range(40)), max_tokens=3)
        bench.step()
        if interrupt:
            bench.scheduler.pause(sequence)
            bench.scheduler.unpause(sequence)
        bench.drain()
        assert sequence.account.counter == 40 + 2 * 3


def test_nobody_makes_way_who_would_come_back_at_once() -> None:
    """A tenant with its one slot goes on, though by weight it has a right to less than a slot."""
    bench = Bench(pages=12, budget=12, running=4, prefix_caching=False)
    once = {name: Tenant(id=name, weight=w, max_running=1) for name, w in (("a", 1.0), ("b", 3.0))}
    bench.scheduler.queue.configure(once)
    sequences: list[Sequence] = []
    for name, counter in (("a", 0), ("b", 200), ("c", 400)):
        for _ in range(2):
            sequences += bench.add([ord(name)] * 27, max_tokens=12, tenant=name)
        sequences[-1].account.counter += counter
    bench.drain(200)
    assert all(s.finish_reason == "length" for s in sequences)
