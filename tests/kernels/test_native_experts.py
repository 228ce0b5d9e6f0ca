"""Mixture of experts on the native kernels: every format, any company, and parts of the experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from kernels.backend import CacheLayout
from kernels.cpu.native_backend import NativeBackend
from kernels.ops import SWIGLU_LIMIT, Activation, Experts, Heads
from kernels.reference import ReferenceOps, TorchWeight
from kernels.routing import route
from kernels.tape import Recorder
from tests.kernels.native import (
    INSTRUCTION_SETS,
    Host,
    batch_of,
    groups_of,
    needs_native,
    quantized,
)

pytestmark = needs_native
HIDDEN, WIDE, COUNT, USED = 64, 96, 7, 3
EXPERTS = Experts(COUNT, USED, normalized=True, first=0, own=COUNT)


@dataclass(frozen=True, eq=False)
class Block:
    """Random experts of one format, and a router."""

    router: torch.Tensor
    gate_up: Host
    down: Host
    gate_up_bias: Host | None = None
    down_bias: Host | None = None
    preference: torch.Tensor | None = None


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ternary(rows: int, columns: int, seed: int) -> Host:
    signs = random(rows, columns, seed=seed).clamp(-1, 1).round().to(torch.int8)
    return Host(signs.float() * 0.1, "TERNARY", signs, scale=0.1)


def block_of(kind: str) -> Block:
    """`kind` is a ggml type, F32, or TERNARY."""
    shapes = {"gate_up": (COUNT * 2 * WIDE, HIDDEN), "down": (COUNT * HIDDEN, WIDE)}
    if kind == "F32":
        made = {name: Host(random(*shape, seed=1)) for name, shape in shapes.items()}
    elif kind == "TERNARY":
        made = {name: ternary(*shape, seed=1) for name, shape in shapes.items()}
    else:
        made = {name: quantized(Type[kind], *shape, seed=1) for name, shape in shapes.items()}
    return Block(random(COUNT, HIDDEN, seed=2), **made)


def run_experts(
    block: Block,
    x: torch.Tensor,
    experts: Experts = EXPERTS,
    *,
    parts: bool = False,
    threads: int = 2,
    weights: Any = "auto",
    instructions: str = "auto",
    activation: Activation = "silu",
) -> torch.Tensor:
    """What the experts of the span make of rows, summed or in `parts`: the inputs are the rows of
    an embedding table, and a matmul by one shows the result."""
    backend = NativeBackend(weights, threads, instructions)
    exact = NativeBackend("float32", 1, instructions)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "bfloat16", 16), 1)
    table, router = exact.load([Host(x)]), exact.load([Host(block.router)])
    span = slice(experts.first, experts.first + experts.own)

    def own(host: Host, rows: int) -> Host:
        return host.narrow(0, span.start * rows, experts.own * rows)

    biases = (block.gate_up_bias, 2 * WIDE), (block.down_bias, HIDDEN)
    added = [[own(bias, rows)] if bias is not None else [] for bias, rows in biases]
    gate_up = backend.load([own(block.gate_up, 2 * WIDE)], added[0])
    down = backend.load([own(block.down, HIDDEN)], added[1])
    recorder = Recorder()
    hidden = recorder.embed(table, 1.0)
    scores = recorder.linear(hidden, router)
    liked = None if block.preference is None else exact.load([Host(block.preference)])
    y = recorder.experts(hidden, scores, gate_up, down, experts, activation, liked)
    if not parts:
        y = recorder.sum_parts(y, experts.places)
    y = recorder.select_rows(y)
    unit = exact.load([Host(torch.eye(y.width))])
    program = backend.compile(recorder.finish(recorder.linear(y, unit)), len(x))
    program.forward(batch_of(range(len(x)), range(len(x))))
    return program.logits().clone()


def expected_parts(
    block: Block, x: torch.Tensor, rounded: Any, gate: Any = torch.nn.functional.silu
) -> torch.Tensor:
    """The same from the weights' exact values, in float64; `rounded` is what activations become."""
    chosen, shares = route(x @ block.router.T, EXPERTS)
    gate_up = block.gate_up.values.double().view(COUNT, 2 * WIDE, HIDDEN)
    down = block.down.values.double().view(COUNT, HIDDEN, WIDE)
    biases = [
        torch.zeros(COUNT, rows) if bias is None else bias.values.view(COUNT, rows)
        for bias, rows in ((block.gate_up_bias, 2 * WIDE), (block.down_bias, HIDDEN))
    ]
    parts = []
    for row, numbers, weights in zip(x, chosen, shares, strict=True):
        for number, share in zip(numbers, weights, strict=True):
            both = gate_up[number] @ rounded(row[None])[0].double() + biases[0][number]
            hidden = (gate(both[:WIDE]) * both[WIDE:]).float()
            y = down[number] @ rounded(hidden[None])[0].double() + biases[1][number]
            parts.append(y * share)
    return torch.stack(parts).view(len(x), -1)


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Activations as the ternary kernel takes them: int8 under one scale a row."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("kind", "weights", "rounded", "bound"),
    [
        ("F32", "float32", lambda x: x, 1e-5),
        ("F32", "auto", lambda x: x, 0.02),
        ("Q4_0", "auto", groups_of, 1e-3),
        ("Q4_1", "auto", groups_of, 1e-3),
        ("Q8_0", "auto", groups_of, 1e-3),
        ("MXFP4", "auto", groups_of, 1e-3),
        ("TERNARY", "auto", whole_rows, 1e-3),
    ],
)
def test_every_format_computes_what_its_weights_say(
    kind: str, weights: str, rounded: Any, bound: float, instructions: str
) -> None:
    block, x = block_of(kind), random(13, HIDDEN, seed=3)
    parts = run_experts(block, x, parts=True, weights=weights, instructions=instructions)
    expected = expected_parts(block, x, rounded)
    assert float((parts - expected).norm() / expected.norm()) < bound
    total = run_experts(block, x, weights=weights, instructions=instructions)
    sums = parts.view(len(x), USED, HIDDEN)
    assert torch.equal(total, sums[:, 0] + sums[:, 1] + sums[:, 2])


def preferring(block: Block) -> Block:
    """The same with one more expert, which all rows go through, and some that are preferred."""
    return replace(block, preference=random(COUNT - 1, seed=6) * 0.3)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_some_are_preferred_and_one_is_shared(kind: str, sigmoid: bool, normalized: bool) -> None:
    whole = preferring(block_of(kind))
    block = replace(whole, router=whole.router[: COUNT - 1])
    x = random(33, HIDDEN, seed=3)
    experts = Experts(COUNT - 1, USED, normalized, 0, COUNT, sigmoid, scale=1.7, shared=1)
    options: Any = {"parts": True, "weights": "float32"}
    found = run_experts(block, x, experts, **options)
    stacks = [TorchWeight("w", h.shape, h.values) for h in (block.gate_up, block.down)]
    assert block.preference is not None
    liked = TorchWeight("p", (COUNT - 1,), block.preference)
    scores = x @ block.router.T
    expected = ReferenceOps([], 1).experts(x, scores, *stacks, experts, "silu", liked)
    assert found.shape == (33, (USED + 1) * HIDDEN)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    likely = scores.sigmoid() if sigmoid else scores.softmax(-1)
    taken = route(scores, experts, block.preference)[0][:, :USED]
    assert not torch.equal(taken, likely.topk(USED).indices), "preferences change nothing here"
    spans = [replace(experts, first=first, own=own) for first, own in ((0, 4), (4, 3))]
    assert torch.equal(sum(run_experts(block, x, span, **options) for span in spans), found)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_each_expert_adds_its_own_bias_whoever_holds_it(instructions: str) -> None:
    block, x = block_of("F32"), random(11, HIDDEN, seed=3)
    biases = Host(random(COUNT * 2 * WIDE, seed=8)), Host(random(COUNT * HIDDEN, seed=9))
    block = replace(block, gate_up_bias=biases[0], down_bias=biases[1])
    expected = expected_parts(block, x, lambda x: x)
    options: Any = {"parts": True, "weights": "float32", "instructions": instructions}
    parts = run_experts(block, x, **options)
    torch.testing.assert_close(parts.double(), expected, rtol=1e-4, atol=1e-3)
    spans = [Experts(COUNT, USED, True, first, own) for first, own in ((0, 4), (4, 3))]
    assert torch.equal(sum(run_experts(block, x, span, **options) for span in spans), parts)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_gates_as_gpt_oss_has_them_are_held_within_their_limit(instructions: str) -> None:
    block, x = block_of("F32"), random(11, HIDDEN, seed=3) * 3
    found = run_experts(
        block, x, parts=True, weights="float32", activation="swiglu_oai", instructions=instructions
    )
    reference = ReferenceOps([], 1)
    stacks = [TorchWeight("w", h.shape, h.values) for h in (block.gate_up, block.down)]
    expected = reference.experts(x, x @ block.router.T, *stacks, EXPERTS, "swiglu_oai")
    both = x @ block.gate_up.values.T
    assert both.max() > SWIGLU_LIMIT > -SWIGLU_LIMIT > both.min(), "nothing to be held"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0", "MXFP4", "TERNARY"])
def test_a_row_alone_and_in_company_gives_the_same_bits(kind: str) -> None:
    block, x = block_of(kind), random(64, HIDDEN, seed=4)
    whole = run_experts(block, x)
    for threads in (1, 2, 3):
        for rows in (1, 2, 5, 33):
            assert torch.equal(run_experts(block, x[:rows], threads=threads), whole[:rows])


@pytest.mark.parametrize("spans", [[(0, 4), (4, 3)], [(0, 1), (1, 5), (6, 1)]])
def test_parts_of_several_spans_add_up_to_the_very_bits_of_all(
    spans: list[tuple[int, int]],
) -> None:
    block, x = block_of("Q4_1"), random(20, HIDDEN, seed=5)
    whole = run_experts(block, x, parts=True)
    added = torch.zeros_like(whole)
    for first, own in spans:
        experts = Experts(COUNT, USED, normalized=True, first=first, own=own)
        added += run_experts(block, x, experts, parts=True)
    assert torch.equal(added, whole)


def test_shares_sum_to_one_only_if_normalized() -> None:
    block, x = block_of("F32"), random(9, HIDDEN, seed=6)
    normalized = run_experts(block, x, parts=True, weights="float32")
    plain = Experts(COUNT, USED, normalized=False, first=0, own=COUNT)
    likely = (x @ block.router.T).softmax(-1).sort(dim=-1, descending=True).values[:, :USED].sum(-1)
    unnormalized = run_experts(block, x, plain, parts=True, weights="float32")
    torch.testing.assert_close(unnormalized, normalized * likely[:, None], rtol=1e-4, atol=1e-5)


def test_of_equal_experts_the_first_are_taken() -> None:
    """A router of zeros finds all alike."""
    block, x = block_of("F32"), random(3, HIDDEN, seed=7)
    same = Block(torch.zeros_like(block.router), block.gate_up, block.down)
    parts = run_experts(same, x, parts=True, weights="float32")
    expected = expected_parts(same, x, lambda x: x)
    torch.testing.assert_close(parts.double(), expected, rtol=1e-4, atol=1e-4)


def test_experts_narrower_than_a_tile_are_refused() -> None:
    backend = NativeBackend("float32", 1)
    backend.allocate_cache(CacheLayout((Heads(1, 1, 16),), 16, "bfloat16", 16), 1)
    recorder = Recorder()
    hidden = recorder.embed(backend.load([Host(random(4, 24))]), 1.0)
    scores = recorder.linear(hidden, backend.load([Host(random(2, 24))]))
    weights = (backend.load([Host(random(64, 24))]), backend.load([Host(random(48, 16))]))
    two = Experts(2, 1, normalized=True, first=0, own=2)
    y = recorder.sum_parts(recorder.experts(hidden, scores, *weights, two, "silu"), 1)
    with pytest.raises(ValueError, match="whole tiles"):
        backend.compile(recorder.finish(recorder.linear(y, weights[0])), 4)


def test_what_does_not_fit_together_is_refused() -> None:
    backend = NativeBackend("float32", 1)
    recorder = Recorder()
    hidden = recorder.embed(backend.load([Host(random(4, 32))]), 1.0)
    scores = recorder.linear(hidden, backend.load([Host(random(3, 32))]))
    weights = (backend.load([Host(random(64, 32))]), backend.load([Host(random(64, 16))]))
    with pytest.raises(ValueError, match="are not 2 experts"):
        recorder.experts(
            hidden, scores, *weights, Experts(2, 1, normalized=True, first=0, own=2), "silu"
        )
    with pytest.raises(ValueError, match="32 values are not 3 parts"):
        recorder.sum_parts(hidden, 3)
