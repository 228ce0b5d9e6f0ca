"""Mixture of experts on the GPU's kernels: every weight format, few rows and many, ranks' parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from kernels.gpu.backend import GpuBackend
from kernels.gpu.experts import FEW, MANY, Layout, sort_rows
from kernels.gpu.ops import GpuOps
from kernels.gpu.staging import Staging
from kernels.gpu.workspace import Workspace
from kernels.ops import Activation, Experts
from kernels.reference import ReferenceOps, TorchWeight
from kernels.routing import route
from tests.kernels.gpu.filled import HOST, gpu_vector
from tests.kernels.native import Host, quantized

HIDDEN, WIDE, COUNT, USED = 64, 48, 5, 2
ALL = Experts(COUNT, USED, normalized=True, first=0, own=COUNT)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ops_for(rows: int, *, invariant: bool = False) -> GpuOps:
    staging = Staging(rows, rows, 1, 0, HOST)
    staging.query_starts[-1] = rows
    return GpuOps([], 16, staging, Workspace(HOST), torch.float32, 16, invariant=invariant)


def run(
    gate_up: Host,
    down: Host,
    x: torch.Tensor,
    scores: torch.Tensor,
    experts: Experts = ALL,
    *,
    weights: Any = "auto",
    invariant: bool = False,
    biases: Sequence[torch.Tensor] = (),
    activation: Activation = "silu",
    preference: torch.Tensor | None = None,
) -> torch.Tensor:
    backend = GpuBackend(weights, "float32", HOST)
    span = slice(experts.first, experts.first + experts.own)

    def own(host: Host) -> Host:
        size = host.shape[0] // experts.total
        return host.narrow(0, span.start * size, experts.own * size)

    ops = ops_for(len(x), invariant=invariant)
    added = [[own(Host(bias))] for bias in biases] or [[], []]
    placed = [backend.load([own(w)], b) for w, b in zip((gate_up, down), added, strict=True)]
    liked = None if preference is None else gpu_vector(preference)
    return ops.experts(x, scores, placed[0], placed[1], experts, activation, liked)


def wanted(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x: torch.Tensor,
    scores: torch.Tensor,
    biases: Sequence[torch.Tensor | None] = (None, None),
    activation: Activation = "silu",
) -> torch.Tensor:
    weights = [
        TorchWeight("w", tuple(t.shape), t, bias)
        for t, bias in zip((gate_up, down), biases, strict=True)
    ]
    return ReferenceOps([], 16).experts(x, scores, *weights, ALL, activation)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("F32", 1), ("F32", 50), ("Q4_1", 3), ("Q4_1", 50), ("Q8_0", 3), ("MXFP4", 3), ("MXFP4", 50)],
)
def test_experts_equal_the_reference(kind: str, rows: int) -> None:
    shapes = (COUNT * 2 * HIDDEN, HIDDEN), (COUNT * HIDDEN, HIDDEN)
    if kind == "F32":
        gate_up, down = (Host(random(*shape, seed=1) * 0.3) for shape in shapes)
    else:
        gate_up, down = (quantized(Type[kind], *shape) for shape in shapes)
    x, scores = random(rows, HIDDEN, seed=2), random(rows, COUNT, seed=3)
    found = run(gate_up, down, x, scores, weights="float32" if kind == "F32" else "auto")
    expected = wanted(gate_up.values, down.values, x, scores)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("rows", [2, 50])
def test_experts_as_gpt_oss_has_them_add_their_own_biases_behind_held_gates(rows: int) -> None:
    gate_up, down = (quantized(Type.MXFP4, COUNT * n * HIDDEN, HIDDEN) for n in (2, 1))
    biases = [random(host.shape[0], seed=4) for host in (gate_up, down)]
    x, scores = random(rows, HIDDEN, seed=2), random(rows, COUNT, seed=3)
    expected = wanted(gate_up.values, down.values, x, scores, biases, "swiglu_oai")
    options: Any = {"biases": biases, "activation": "swiglu_oai"}
    found = run(gate_up, down, x, scores, **options)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    spans = [Experts(COUNT, USED, normalized=True, first=f, own=n) for f, n in ((0, 2), (2, 3))]
    parts = [run(gate_up, down, x, scores, span, **options) for span in spans]
    assert torch.equal(parts[0] + parts[1], found)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("rows", "normalized"), [(3, True), (50, False)])
def test_some_are_preferred_and_some_are_shared(
    rows: int, normalized: bool, *, sigmoid: bool
) -> None:
    gate_up, down = (Host(random(COUNT * n * HIDDEN, HIDDEN, seed=1) * 0.3) for n in (2, 1))
    experts = Experts(COUNT - 2, USED, normalized, 0, COUNT, sigmoid, scale=1.7, shared=2)
    x, scores = random(rows, HIDDEN, seed=2), random(rows, COUNT - 2, seed=3)
    preference = torch.tensor([0.0, 0.9, -0.9])
    options: Any = {"preference": preference, "weights": "float32"}
    found = run(gate_up, down, x, scores, experts, **options)
    weights = [TorchWeight("w", tuple(h.shape), h.values) for h in (gate_up, down)]
    liked = TorchWeight("p", (COUNT - 2,), preference)
    expected = ReferenceOps([], 16).experts(x, scores, *weights, experts, "silu", liked)
    assert found.shape == (rows, 4 * HIDDEN)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    spans = [replace(experts, first=first, own=own) for first, own in ((0, 4), (4, 1))]
    parts = [run(gate_up, down, x, scores, span, **options) for span in spans]
    assert torch.equal(parts[0] + parts[1], found)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_experts_are_chosen_from_the_best_groups(*, sigmoid: bool) -> None:
    count, rows = 12, 40
    gate_up, down = (Host(random(count * n * HIDDEN, HIDDEN, seed=1) * 0.3) for n in (2, 1))
    experts = Experts(count, 3, True, 0, count, sigmoid, groups=4, kept=2)
    x, scores = random(rows, HIDDEN, seed=2), random(rows, count, seed=3)
    preference = random(count, seed=4) * 0.3
    options: Any = {"preference": preference, "weights": "float32"}
    found = run(gate_up, down, x, scores, experts, **options)
    weights = [TorchWeight("w", tuple(h.shape), h.values) for h in (gate_up, down)]
    liked = TorchWeight("p", (count,), preference)
    expected = ReferenceOps([], 16).experts(x, scores, *weights, experts, "silu", liked)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    free = replace(experts, groups=1, kept=1)
    taken = [route(scores, e, preference)[0] for e in (experts, free)]
    assert not torch.equal(*taken), "groups change nothing here"
    assert (taken[0] // 3).sort(1).values.unique_consecutive(dim=1).shape[1] <= 3


def test_int8_experts_have_a_scale_an_output() -> None:
    gate_up, down = Host(random(COUNT * 2 * WIDE, HIDDEN)), Host(random(COUNT * HIDDEN, WIDE))
    x, scores = random(9, HIDDEN, seed=2), random(9, COUNT, seed=3)
    found = run(gate_up, down, x, scores, weights="int8")
    expected = wanted(gate_up.values, down.values, x, scores)
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("invariant", [False, True])
def test_a_row_alone_and_in_company_gives_the_same_bits(invariant: bool) -> None:
    gate_up, down = Host(random(COUNT * 2 * WIDE, HIDDEN)), Host(random(COUNT * HIDDEN, WIDE))
    x, scores = random(12, HIDDEN, seed=2), random(12, COUNT, seed=3)
    options: Any = {"weights": "float32", "invariant": invariant}
    whole = run(gate_up, down, x, scores, **options)
    for rows in (1, 5):
        assert torch.equal(run(gate_up, down, x[:rows], scores[:rows], **options), whole[:rows])


def test_ranks_parts_add_up_to_the_whole() -> None:
    gate_up, down = Host(random(COUNT * 2 * WIDE, HIDDEN)), Host(random(COUNT * HIDDEN, WIDE))
    x, scores = random(11, HIDDEN, seed=2), random(11, COUNT, seed=3)
    whole = run(gate_up, down, x, scores, weights="float32")
    added = torch.zeros_like(whole)
    for first, own in ((0, 2), (2, 3)):
        experts = Experts(COUNT, USED, normalized=True, first=first, own=own)
        added += run(gate_up, down, x, scores, experts, weights="float32")
    assert torch.equal(added, whole)


@pytest.mark.parametrize(
    ("rows", "count", "used", "first", "own", "normalized"),
    [
        (1, 6, 4, 0, 6, True),
        (40, 9, 3, 4, 2, False),
        (40, 3, 1, 0, 3, True),
        (550, 3, 2, 1, 1, True),
    ],
)
def test_rows_are_laid_out_by_expert(
    rows: int, count: int, used: int, first: int, own: int, normalized: bool
) -> None:
    experts = Experts(count, used, normalized, first, own)
    layout, scores = Layout(experts, rows), random(rows, count)
    scores[:, 1] = scores[:, 0]  # equals: the lower number goes first
    order = sort_rows(scores, layout, torch.tensor([rows], dtype=torch.int32))
    chosen, shares = route(scores, experts)
    torch.testing.assert_close(order.shares.view(rows, used), shares)
    seen = set()
    for choice, number in enumerate(chosen.flatten().tolist()):
        place = int(order.places[choice])
        if not first <= number < first + own:
            assert place == -1
            continue
        assert int(order.sources[place]) == choice // used
        assert int(order.experts[place // layout.block_rows]) == number - first
        seen.add(place)
    assert len(seen) == int((order.places >= 0).sum())
    filled = {place // layout.block_rows for place in seen}
    for block, number in enumerate(order.experts.tolist()):
        assert (number >= 0) == (block in filled)
    empty = [p for p in range(len(order.sources)) if p not in seen]
    assert all(int(order.sources[p]) == -1 for p in empty)


def test_padding_goes_nowhere() -> None:
    experts = Experts(4, 2, normalized=True, first=0, own=4)
    scores = random(8, 4)
    scores[5:] = float("nan")  # whatever memory held
    order = sort_rows(scores, Layout(experts, 8), torch.tensor([5], dtype=torch.int32))
    assert (order.places[:10] >= 0).all()
    assert (order.places[10:] == -1).all()
    assert sorted(p for p in order.sources.tolist() if p >= 0) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_worst_choice_fits() -> None:
    """Blocks are enough, however rows are spread."""
    for rows in (1, 2, 17, 64, 200):
        for block in (FEW, MANY):
            for heavy in range(rows + 1):
                counts = [heavy] + [1] * min(rows - heavy, 5)
                used = sum(-(-c // block) for c in counts)
                assert used <= min(sum(counts), 6) + sum(counts) // block


def test_sums_of_parts_are_added_in_order() -> None:
    x = random(7, 3 * 40)
    expected = ReferenceOps([], 16).sum_parts(x, 3)
    torch.testing.assert_close(ops_for(7).sum_parts(x, 3), expected)
