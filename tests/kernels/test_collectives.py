"""Sums and gathers among ranks: threads that share memory, and processes on gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from kernels.collectives import GIVEN_UP, SLOT_BYTES, Place, SharedMemory
from kernels.cpu.native_backend import native_module
from tests.kernels.native import needs_native
from tests.ranks import on_ranks, places

ROOT = Path(__file__).parents[2]


def shared(place: Place) -> SharedMemory:
    return SharedMemory(place, native_module())


def part(rank: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rank))


@needs_native
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 33), (64, 576)])
def test_sums_run_in_the_order_of_the_ranks(ranks: int, rows: int, width: int) -> None:
    wanted = part(0, rows, width)
    for rank in range(1, ranks):
        wanted = wanted + part(rank, rows, width)
    for got in on_ranks(ranks, lambda p: shared(p).all_reduce(part(p.rank, rows, width))):
        assert torch.equal(got, wanted)


@needs_native
@pytest.mark.parametrize("widths", [[3, 1, 4], [1, 1], [64, 512, 0 + 7, 9]])
def test_a_gather_puts_uneven_parts_side_by_side(widths: list[int]) -> None:
    rows = 21
    wanted = torch.cat([part(rank, rows, width) for rank, width in enumerate(widths)], 1)

    def work(place: Place) -> torch.Tensor:
        return shared(place).all_gather(part(place.rank, rows, widths[place.rank]), widths)

    for got in on_ranks(len(widths), work):
        assert torch.equal(got, wanted)


@needs_native
def test_what_does_not_fit_at_once_goes_in_pieces_and_turns_never_mix() -> None:
    """Three slots full, and a thousand small ones behind each other."""
    rows = 3 * SLOT_BYTES // 4 // 1000 + 1

    def work(place: Place) -> list[torch.Tensor]:
        group = shared(place)
        large = group.all_reduce(part(place.rank, rows, 1000))
        small = [group.all_reduce(torch.full((1, 3), float(place.rank + i))) for i in range(1000)]
        return [large, torch.stack(small)]

    wanted = part(0, rows, 1000) + part(1, rows, 1000)
    turns = (torch.arange(1000.0) * 2 + 1)[:, None, None].expand(-1, 1, 3)
    for large, small in on_ranks(2, work):
        assert torch.equal(large, wanted)
        assert torch.equal(small, turns)


@needs_native
def test_a_rank_that_gives_up_frees_those_that_wait_for_it() -> None:
    with places(2) as (first, second):
        waiting, other = shared(first), shared(second)
        raised: list[str] = []

        def wait() -> None:
            try:
                waiting.all_reduce(torch.ones(1, 4))
            except RuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        other.abort()
        thread.join(5)
        assert raised == [GIVEN_UP]
        with pytest.raises(RuntimeError, match=GIVEN_UP):
            other.all_reduce(torch.ones(1, 4))


@needs_native
def test_memory_that_is_too_small_or_not_there_is_refused() -> None:
    native = native_module()
    assert native is not None
    memory = os.memfd_create("small")
    try:
        with pytest.raises(ValueError, match="too small"):
            native.Exchange(memory, 0, 2, 4096)
        with pytest.raises(ValueError, match="no such rank"):
            native.Exchange(memory, 2, 2, 4096)
    finally:
        os.close(memory)
    with pytest.raises(RuntimeError, match="fstat"):
        native.Exchange(memory, 0, 2, 4096)


GLOO = """
import sys, torch
from kernels.collectives import Place, ProcessGroup
rank, memory = int(sys.argv[1]), int(sys.argv[2])
group = ProcessGroup(Place(rank, 3, memory), "gloo")
def part(rank, width):
    return torch.randn(5, width, generator=torch.Generator().manual_seed(rank))
total = group.all_reduce(part(rank, 8))
assert torch.equal(total, part(0, 8) + part(1, 8) + part(2, 8)), "sums have an order"
widths = [2, 7, 1]
gathered = group.all_gather(part(rank, widths[rank]), widths)
assert torch.equal(gathered, torch.cat([part(r, w) for r, w in enumerate(widths)], 1))
"""


def test_gloo_does_the_same_where_there_is_no_native_module() -> None:
    memory = os.memfd_create("store")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GLOO, str(rank), str(memory)],
            cwd=ROOT,
            pass_fds=(memory,),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        os.close(memory)
