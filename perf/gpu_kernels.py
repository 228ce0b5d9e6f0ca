"""The GPU kernels one by one: against float64, against themselves again, against the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch

from kernels.backend import WeightFormat
from kernels.gpu.catalogue import LLAMA_1B, LLAMA_8B, QWEN_06B, Dimensions
from kernels.gpu.draws import Draws
from kernels.gpu.launch import early_launches
from kernels.gpu.ops import GpuOps
from kernels.gpu.roofline import H100, attention_seconds, card_of, matmul_seconds
from kernels.gpu.staging import Staging
from kernels.gpu.weights import GpuWeight, place
from kernels.gpu.workspace import Bucket, GpuCache, Workspace
from kernels.ops import Activation, DeltaHeads, Experts, Heads, LatentHeads, Weight
from kernels.reference import ReferenceOps, TorchWeight, tensor_of
from perf.gpu_batches import PAGE, batch_over_pages
from perf.gpu_delta import Delta
from perf.gpu_heads import HeadsOfRow
from perf.gpu_latents import Latents
from perf.gpu_tensors import Blocks, Matrix, dense_of

BF16 = torch.bfloat16


class Attention:
    """A cache with random content, and one launch of attention over it."""

    def __init__(
        self,
        device: torch.device,
        heads: Heads,
        counts: list[int],
        before: list[int],
        *,
        quantized: bool = False,
        invariant: bool = False,
        sinks: bool = False,
    ) -> None:
        scores = torch.randn(heads.query, device=device)
        self.sinks = GpuWeight("sinks", (heads.query,), "float", scores) if sinks else None
        self.heads, self.counts, self.before = heads, counts, before
        batch = batch_over_pages(counts, before)
        width, rows = batch.page_table.shape[1], len(batch.token_ids)
        pages = width * len(counts)
        self.table = torch.from_numpy(batch.page_table).to(device)
        staging = Staging(rows, len(counts), width, pages * PAGE - 1, device)
        staging.copy(batch)
        shape = (pages * PAGE, heads.kv, heads.dim)
        if quantized:
            numbers = [torch.randint(-127, 128, shape, device=device).to(torch.int8) for _ in "kv"]
            scales = [torch.rand(shape[:2], device=device) * 0.02 for _ in "kv"]
            self.cache = GpuCache(numbers[0], numbers[1], scales[0], scales[1])
        else:
            made = [torch.randn(shape, device=device).to(BF16) for _ in "kv"]
            self.cache = GpuCache(made[0], made[1])
        self.queries = torch.randn(rows, heads.query * heads.dim, device=device).to(BF16)
        workspace = workspace_of(device)
        self.ops = GpuOps([self.cache], PAGE, staging, workspace, BF16, width * PAGE, invariant)
        decode = all(count == 1 for count in counts)
        self.ops.bucket = Bucket(rows, len(counts), 1, decode)

    def run(self) -> torch.Tensor:
        """bf16 `[rows, query heads * dim]`."""
        scale = self.heads.dim**-0.5
        return self.ops.attention(self.queries, 0, self.heads, scale, 0, self.sinks)

    def exact(self) -> torch.Tensor:
        """The same in float64, from what the cache holds."""
        heads, first, outputs = self.heads, 0, []
        cache = self.cache
        for chunk, (count, before) in enumerate(zip(self.counts, self.before, strict=True)):
            length = count + before
            slots = self.table[chunk].long()[:, None] * PAGE
            slots = (slots + torch.arange(PAGE, device=slots.device)).flatten()[:length]
            keys, values = cache.keys[slots].double(), cache.values[slots].double()
            if cache.key_scales is not None and cache.value_scales is not None:
                keys = keys * cache.key_scales[slots].double()[..., None]
                values = values * cache.value_scales[slots].double()[..., None]
            group = heads.query // heads.kv
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
            q = self.queries[first : first + count].double().view(count, heads.query, heads.dim)
            scores = torch.einsum("qhd,khd->hqk", q, keys) * heads.dim**-0.5
            place = torch.arange(before, length, device=slots.device)[:, None]
            hidden = torch.arange(length, device=slots.device)[None] > place
            scores = scores.masked_fill(hidden, float("-inf"))
            if self.sinks is not None:
                sink = self.sinks.tensor.double()[:, None, None].expand(-1, count, 1)
                scores = torch.cat((scores, sink), -1)
            weights = scores.softmax(-1)[..., :length]
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values).reshape(count, -1))
            first += count
        return torch.cat(outputs)


def linear_of(
    device: torch.device, weight: GpuWeight, *, invariant: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The op on one weight, without a model, as a step of so many rows has it."""
    ops = ops_without_model(device, invariant=invariant)

    def run(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and ops.fits_row(weight):
            return ops.row_linear(x, weight, None, 0.0, None, "")
        return ops.linear(x, weight)

    return run


def ops_without_model(device: torch.device, *, invariant: bool = False, rows: int = 1) -> GpuOps:
    """Ops in bf16 that have no cache, in a step of so many rows."""
    staging = Staging(16, 1, 1, 0, device)
    staging.query_starts.fill_(rows)
    return GpuOps([], PAGE, staging, workspace_of(device), BF16, PAGE, invariant)


def workspace_of(device: torch.device) -> Workspace:
    """As the engine has it on this device."""
    return Workspace(device, early_launches(device) or device.type != "cuda")


def check_kernels(device: torch.device, *, smoke: bool) -> list[dict[str, Any]]:
    """Largest error of each kernel relative to its largest output, and whether a repetition ever
    gave other bits."""
    found: list[dict[str, Any]] = []
    repeats = 1 if smoke else 200

    def check(name: str, run: Callable[[], torch.Tensor], exact: torch.Tensor, most: float) -> None:
        first = run()
        error = float((first.double() - exact).abs().max() / exact.abs().max())
        races = sum(not torch.equal(run(), first) for _ in range(repeats))
        found.append(
            {"name": name, "error": error, "races": races, "ok": error < most and not races}
        )

    heads = Heads(4, 2, 32) if smoke else Heads(32, 8, 128)
    long = 70 if smoke else 3000
    mixtures = {
        "decode": ([1] * 3, [long, 0, 33]),
        "prefill": ([17 if smoke else 300], [0]),
        "mixed": ([1, 7, 1, 3], [long, 4, 0, 22]),
    }
    if smoke:
        mixtures = {"mixed": mixtures["mixed"]}
    for name, (counts, before) in mixtures.items():
        for quantized in (False, True):
            for invariant in (quantized,) if smoke else (False, True):
                made = Attention(
                    device, heads, counts, before, quantized=quantized, invariant=invariant
                )
                label = f"attention {name} {'int8' if quantized else 'bf16'}"
                label += " invariant" if invariant else ""
                check(label, made.run, made.exact(), 2e-2)
        made = Attention(device, heads, counts, before, sinks=True)
        check(f"attention {name} sinks", made.run, made.exact(), 2e-2)
    outputs, inputs = (70, 160) if smoke else (4096, 4096)
    matrix = torch.randn(outputs, inputs, device=device).to(BF16)
    formats: tuple[WeightFormat, ...] = ("int4",) if smoke else ("bfloat16", "int8", "int4")
    for kind in formats:
        weight = place("w", [Matrix(matrix)], [], kind, BF16, device)
        for rows in (1, 20) if smoke else (1, 7, 16, 24, 33, 100, 300):
            x = torch.randn(rows, inputs, device=device).to(BF16)
            for invariant in (False, True):
                linear = linear_of(device, weight, invariant=invariant)
                exact = x.double() @ dense_of(weight).t()
                label = f"matmul {kind} {rows} rows{' invariant' if invariant else ''}"
                # int8 also rounds the activations.
                check(label, lambda f=linear, x=x: f(x), exact, 3e-2)  # type: ignore[misc]
    _check_rows(device, matrix, check, formats[-1:] if smoke else ("bfloat16", "int4"))
    _check_odd(device, check, smoke=smoke)
    _check_experts(device, check, smoke=smoke)
    delta = DeltaHeads(2, 4, 16, 32, 4) if smoke else DeltaHeads(16, 32, 128, 128, 4)
    for counts, before in (([1, 1, 1], [5, 0, 130]), ([7, 1, 40], [0, 9, 33])):
        layer = Delta(device, delta, counts, before)
        check(f"delta net {counts}", layer.run, layer.exact(), 2e-2)
    latents = LatentHeads(4, 32, 16, 8) if smoke else LatentHeads(16, 512, 128, 64)
    for counts, before in (([1, 1, 1], [long, 0, 130]), ([7, 1, 40], [0, 9, 33])):
        attention = Latents(device, latents, counts, before, workspace_of(device))
        check(f"latents {counts}", attention.run, attention.exact(), 2e-2)
    found.append(_check_draws(device, 300 if smoke else 128256, repeats // 2))
    return found


def _check_rows(
    device: torch.device,
    matrix: torch.Tensor,
    check: Callable[..., None],
    formats: tuple[WeightFormat, ...],
) -> None:
    """A row's matmul with all that can stand around it."""
    ops, inputs = ops_without_model(device), matrix.shape[1]
    x = torch.randn(1, inputs, device=device).to(BF16)
    scale = torch.rand(inputs, device=device) + 0.5
    norm = GpuWeight("n", (inputs,), "float", scale)
    normed = x.double() * torch.rsqrt(x.double().square().mean() + 1e-5) * scale
    for kind in formats:
        weight = place("w", [Matrix(matrix)], [], kind, BF16, device)
        exact = normed @ dense_of(weight).t()
        residual = torch.randn_like(exact).to(BF16)
        half = exact.shape[1] // 2
        gated = torch.nn.functional.silu(exact[:, :half]) * exact[:, half:]
        added, plain = partial(ops.row_linear, x, weight, norm, 1e-5, residual, ""), residual
        check(f"row {kind} norm, residual", added, exact + plain, 1e-2)
        check(
            f"row {kind} norm, gate",
            partial(ops.row_linear, x, weight, norm, 1e-5, None, "silu"),
            gated,
            1e-2,
        )
        dim = 10 if len(matrix) == 70 else 128
        heads = Heads(len(matrix) // dim - 4, 2, dim)
        rotated = HeadsOfRow(device, heads, weight, workspace_of(device))
        check(f"row {kind} norm, rotated heads", rotated.all_heads, rotated.exact(), 1e-2)


def _check_odd(device: torch.device, check: Callable[..., None], *, smoke: bool) -> None:
    """Sizes that no block divides, groups of 32, a bias, and results in fp32."""
    outputs, inputs = (70, 160) if smoke else (4100, 576)
    bias = Matrix(torch.randn(outputs, device=device))
    tensors: dict[str, tuple[Any, WeightFormat]] = {
        "bfloat16": (Matrix(torch.randn(outputs, inputs, device=device).to(BF16)), "bfloat16"),
        "int4": (Matrix(torch.randn(outputs, inputs, device=device).to(BF16)), "int4"),
        "Q4_1": (Blocks("Q4_1", (outputs, inputs)), "auto"),
        "Q8_0": (Blocks("Q8_0", (outputs, inputs)), "auto"),
        "MXFP4": (Blocks("MXFP4", (outputs, inputs)), "auto"),
    }
    if smoke:
        tensors = {"Q4_1": tensors["Q4_1"]}
    for name, (tensor, kind) in tensors.items():
        weight = place("w", [tensor], [bias], kind, BF16, device)
        ops, dense = ops_without_model(device), dense_of(weight)
        for rows in (1,) if smoke else (1, 7, 20, 64, 128, 200):
            x = torch.randn(rows, inputs, device=device).to(BF16)
            ops.target = torch.zeros(rows, outputs, device=device)
            run = partial(ops.linear, x, weight)
            if rows == 1 and ops.fits_row(weight):
                run = partial(ops.row_linear, x, weight, None, 0.0, None, "")
            exact = x.double() @ dense.t() + bias.values.double()
            # Each run writes to the same place.
            check(f"odd {name} {rows} rows", lambda run=run: run().clone(), exact, 3e-2)


class ExactOps(ReferenceOps):
    """The reference in float64."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        placed = tensor_of(weight)
        return torch.nn.functional.linear(x, placed.tensor, placed.bias)


def _check_experts(device: torch.device, check: Callable[..., None], *, smoke: bool) -> None:
    """Mixtures of experts, few rows an expert and many, and a rank's half of them; MXFP4's as
    gpt-oss has them."""
    hidden, wide, count, used = (64, 48, 4, 2) if smoke else (1024, 576, 32, 4)
    shapes = (2 * wide, hidden), (hidden, wide)
    for kind in ("int4",) if smoke else ("bfloat16", "int8", "int4", "MXFP4"):
        activation: Activation = "swiglu_oai" if kind == "MXFP4" else "silu"
        for first, own in ((0, count), (count // 2, count // 2)):
            experts = Experts(count, used, normalized=True, first=first, own=own)
            gate_up, down = (
                _random_experts(device, kind, own * rows, columns) for rows, columns in shapes
            )
            for rows in (5,) if smoke else (1, 40, 700):
                x = torch.randn(rows, hidden, device=device).to(BF16)
                scores = torch.randn(rows, count, device=device).to(BF16)
                ops = ops_without_model(device, rows=rows)
                exact = ExactOps([], 1).experts(
                    x.double(), scores, _exact(gate_up), _exact(down), experts, activation
                )
                run = partial(ops.experts, x, scores, gate_up, down, experts, activation)
                check(f"experts {kind} {rows} rows, {own} of {count}", run, exact, 3e-2)


def _random_experts(device: torch.device, kind: str, rows: int, columns: int) -> GpuWeight:
    """Stacked weights, in MXFP4 with a bias."""
    if kind == "MXFP4":
        bias = Matrix(torch.randn(rows, device=device))
        return place("w", [Blocks(kind, (rows, columns))], [bias], "auto", BF16, device)
    matrix = Matrix(torch.randn(rows, columns, device=device).to(BF16) * 0.05)
    return place("w", [matrix], [], cast("WeightFormat", kind), BF16, device)


def _exact(weight: GpuWeight) -> TorchWeight:
    """What a placed weight stands for, in float64."""
    bias = None if weight.bias is None else weight.bias.double()
    return TorchWeight(weight.name, weight.shape, dense_of(weight), bias)


def _check_draws(device: torch.device, vocab: int, repeats: int) -> dict[str, Any]:
    """Greedy, top-k and top-p draws of random logits fall where sorting says that they may, and
    are the same every time."""
    from perf.gpu import greedy

    rows = 4
    logits = torch.randn(rows, vocab, device=device) * 3
    draws = Draws(rows, vocab, torch.zeros(rows, dtype=torch.int64, device=device), device)
    ordered = torch.softmax(logits.double(), -1).sort(descending=True).values.cumsum(1)
    nucleus = (ordered < 0.6).sum(1) + 1
    wrong = races = 0
    for temperature, top_k, top_p in ((0.0, 50, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.6)):
        sampling = greedy(rows)
        sampling.temperature[:], sampling.top_k[:] = temperature, top_k
        sampling.top_p[:] = top_p
        most = nucleus if top_p < 1 else top_k if temperature else 1
        for draw in range(3):
            sampling.uniform[:] = (draw + 0.5) / 3

            def launch(count: int, filtered: bool) -> None:
                draws.launch(count, logits, filtered=filtered)

            ids = draws.draw(logits, sampling, launch).clone()
            rank = (logits > logits.gather(1, ids[:, None])).sum(1)
            wrong += int((rank >= most).sum())
            for _ in range(repeats):
                again = draws.draw(logits, sampling, launch)
                races += not torch.equal(again, ids)
    ok = wrong == races == 0
    return {"name": "draws", "error": float(wrong), "races": races, "ok": ok}


def seconds_a_launch(launches: Sequence[Callable[[], Any]]) -> float:
    """Seconds of one of these, in a captured graph of them all, as a step has them; median of 5."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(sorted(times)[2]) * 1e-3 / 2 / len(launches)


def copies_of(size: float) -> int:
    """How many things of so many bytes do not fit a GPU's cache together."""
    return max(2, min(24, int(600e6 / size)))


def heads_of_row(device: torch.device, model: Dimensions) -> Iterator[tuple[str, list[HeadsOfRow]]]:
    """A row's rotated heads with so many weights that a cache does not hold them."""
    shape, workspace = (model.heads.qkv_width, model.hidden), workspace_of(device)
    formats: tuple[WeightFormat, ...] = ("bfloat16", "int4")
    for kind in formats:
        made = []
        for _ in range(copies_of(shape[0] * shape[1] * (2 if kind == "bfloat16" else 0.5))):
            matrix = Matrix(torch.randn(shape, device=device).to(BF16))
            weight = place("w", [matrix], [], kind, BF16, device)
            made.append(HeadsOfRow(device, model.heads, weight, workspace))
        yield kind, made


def time_kernels(device: torch.device) -> list[str]:
    """Kernel times beside torch's own and the roofline, as lines of text."""
    card = card_of(torch.cuda.get_device_name(device)) or H100
    lines = [f"{'kernel':36} {'us':>9} {'peer us':>9} {'roofline us':>11} share"]
    Runs = Sequence[Callable[[], Any]]

    def line(name: str, runs: Runs, peers: Runs, bound: float) -> None:
        ours, theirs = seconds_a_launch(runs) * 1e6, seconds_a_launch(peers) * 1e6
        share = bound * 1e6 / ours
        lines.append(f"{name:36} {ours:9.1f} {theirs:9.1f} {bound * 1e6:11.1f} {share:5.0%}")

    sdpa = torch.nn.functional.scaled_dot_product_attention
    for model in (LLAMA_8B, QWEN_06B):
        heads = model.heads
        for rows, context in ((1, 8192), (16, 4096), (64, 4096), (256, 1024)):
            shape = (rows, heads.kv, context, heads.dim)
            count = copies_of(4 * rows * heads.kv * context * heads.dim)
            made = [
                Attention(device, heads, [1] * rows, [context - 1] * rows) for _ in range(count)
            ]
            q = made[0].queries.view(rows, heads.query, 1, heads.dim)
            kv = [[torch.randn(shape, device=device).to(BF16) for _ in "kv"] for _ in range(count)]
            peers = [partial(sdpa, q, k, v, enable_gqa=True) for k, v in kv]
            bound = attention_seconds(model, card, rows, context)
            name = f"decode attention {model.name} {rows}x{context}"
            line(name, [one.run for one in made], peers, bound)
            del made, kv, peers
    for model in (LLAMA_1B, LLAMA_8B):
        for kind, rotated in heads_of_row(device, model):
            bound = matmul_seconds(card, 1, model.heads.qkv_width, model.hidden, kind)
            name = f"{kind} {model.name} rotated qkv 1 row"
            line(name, [r.at_once for r in rotated], [r.one_by_one for r in rotated], bound)
        for part, outputs, inputs in (
            ("gate_up", 2 * model.intermediate, model.hidden),
            ("o", model.hidden, model.heads.query * model.heads.dim),
        ):
            formats: tuple[WeightFormat, ...] = ("bfloat16", "int8", "int4")
            for kind in formats:
                matrices = [
                    torch.randn(outputs, inputs, device=device).to(BF16)
                    for _ in range(copies_of(outputs * inputs * (2 if kind == "bfloat16" else 0.5)))
                ]
                weights = [place("w", [Matrix(m)], [], kind, BF16, device) for m in matrices]
                for rows in (1, 16, 64, 512):
                    x = torch.randn(rows, inputs, device=device).to(BF16)
                    line(
                        f"{kind} {model.name} {part} {rows} rows",
                        [partial(linear_of(device, w), x) for w in weights],
                        [partial(torch.mm, x, m.t()) for m in matrices],
                        matmul_seconds(card, rows, outputs, inputs, kind),
                    )
                del matrices, weights
    return lines
