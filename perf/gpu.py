"""Everything about the GPU path in one command: correctness, races, speed beside the roofline.

    PYTHONPATH=. python -m perf.gpu [--json FILE] [--only kernels,steps,engine]

Needs an NVIDIA GPU and what the engine imports; no network. Kernels are checked against float64 on
random inputs and repeated for races; timed against torch's attention and cuBLAS and against the
roofline; then whole models with random weights decode and prefill, with and without captured
graphs; last, 256 requests go through the real engine and `transformers` (`perf.gpu_engine`).
`--smoke` runs it all at toy sizes, in Triton's interpreter if TRITON_INTERPRET is set.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.models.config import read_config
from engine.models.llama import Llama
from engine.models.loader import WeightLoader
from kernels.backend import CacheLayout, WeightFormat
from kernels.batch import Batch, Sampling
from kernels.gpu.backend import GpuBackend
from kernels.gpu.catalogue import LLAMA_1B, LLAMA_8B, QWEN_06B, Dimensions
from kernels.gpu.program import GpuProgram
from kernels.gpu.roofline import card_of, step_seconds
from kernels.ops import Heads
from kernels.tape import Recorder
from perf.gpu_kernels import check_kernels, time_kernels

TOY = Dimensions("toy", 64, 96, 2, Heads(4, 2, 16), 300, norms=True)
PAGE = 16


@dataclass(frozen=True, eq=False)
class RandomTensor:
    """A tensor of a model that nobody trained, made on the device."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    format: str = "BF16"
    block: int = 1

    def narrow(self, dimension: int, start: int, length: int) -> RandomTensor:
        shape = list(self.shape)
        shape[dimension] = length
        return replace(self, shape=tuple(shape))

    def dense(self) -> torch.Tensor:
        if len(self.shape) == 1:
            return torch.ones(self.shape)
        made = torch.empty(self.shape, dtype=torch.bfloat16, device=self.device)
        return made.normal_(0, self.shape[1] ** -0.5)

    def packed(self) -> torch.Tensor:
        raise ValueError("random weights are not in blocks")


@dataclass(eq=False)
class RandomCheckpoint:
    """A model of these dimensions, without a file."""

    model: Dimensions
    device: torch.device
    context: int
    path: Path = Path("random")
    norms_include_one: bool = False
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m, heads = self.model, self.model.heads
        q, kv = heads.query * heads.dim, heads.kv * heads.dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (m.vocab, m.hidden),
            "model.norm.weight": (m.hidden,),
        }
        if not m.tied:
            shapes["lm_head.weight"] = (m.vocab, m.hidden)
        for layer in range(m.layers):
            name = f"model.layers.{layer}"
            shapes |= {
                f"{name}.input_layernorm.weight": (m.hidden,),
                f"{name}.post_attention_layernorm.weight": (m.hidden,),
                f"{name}.self_attn.q_proj.weight": (q, m.hidden),
                f"{name}.self_attn.k_proj.weight": (kv, m.hidden),
                f"{name}.self_attn.v_proj.weight": (kv, m.hidden),
                f"{name}.self_attn.o_proj.weight": (m.hidden, q),
                f"{name}.mlp.gate_proj.weight": (m.intermediate, m.hidden),
                f"{name}.mlp.up_proj.weight": (m.intermediate, m.hidden),
                f"{name}.mlp.down_proj.weight": (m.hidden, m.intermediate),
            }
            if m.norms:
                for part in "qk":
                    shapes[f"{name}.self_attn.{part}_norm.weight"] = (heads.dim,)
        self.shapes = shapes
        self.config: dict[str, Any] = {
            "model_type": "qwen3" if m.norms else "llama",
            "hidden_size": m.hidden,
            "intermediate_size": m.intermediate,
            "num_hidden_layers": m.layers,
            "num_attention_heads": heads.query,
            "num_key_value_heads": heads.kv,
            "head_dim": heads.dim,
            "vocab_size": m.vocab,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": m.tied,
        }

    def names(self) -> set[str]:
        return set(self.shapes)

    def tensor(self, name: str) -> RandomTensor:
        return RandomTensor(name, self.shapes[name], self.device)

    def rope_factors(self) -> list[float] | None:
        return None


def build(
    model: Dimensions,
    device: torch.device,
    *,
    weights: WeightFormat,
    context: int,
    sequences: int,
    pages: int,
    rows: int,
    capture: bool,
    invariant: bool,
) -> tuple[GpuProgram, GpuBackend]:
    """A model with random weights and a cache of so many pages, compiled."""
    backend = GpuBackend(weights, "bfloat16", device, capture=capture, invariant=invariant)
    checkpoint = RandomCheckpoint(model, device, context)
    config = read_config(checkpoint.config, None)
    placed = Llama(config, WeightLoader(checkpoint, backend, lambda *_: None))
    backend.allocate_cache(
        CacheLayout((model.heads,) * model.layers, PAGE, "bfloat16", context), pages
    )
    recorder = Recorder()
    tape = recorder.finish(placed.forward(recorder))
    return backend.compile(tape, rows, sequences), backend


def batch_of(counts: list[int], before: int, vocab: int) -> Batch:
    """Chunks of these sizes, each behind `before` tokens, on pages of its own."""
    width = -(-(before + max(counts)) // PAGE)
    rng = np.random.default_rng(0)
    table = rng.permutation(width * len(counts)).reshape(len(counts), width).astype(np.int32)
    positions = np.concatenate([np.arange(before, before + count) for count in counts])
    rows = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return Batch(
        token_ids=rng.integers(0, vocab, len(positions)),
        positions=positions,
        kv_slots=table[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        query_starts=np.array([0, *ends], np.int32),
        context_lengths=np.array(counts, np.int32) + np.int32(before),
        table_rows=np.arange(len(counts), dtype=np.int32),
        page_table=table,
        sample_rows=ends - 1,
    )


def greedy(rows: int) -> Sampling:
    """Every row takes its best token."""

    def full(value: float, dtype: type = np.float32) -> Any:
        return np.full(rows, value, dtype)

    return Sampling(
        targets=full(-1, np.int64),
        temperature=full(0),
        top_k=full(0, np.int32),
        top_p=full(1),
        min_p=full(0),
        uniform=full(0, np.float64),
        top_logprobs=full(-1, np.int32),
        repetition_penalty=full(1),
        presence_penalty=full(0),
        frequency_penalty=full(0),
    )


def seconds_of(
    program: GpuProgram, batch: Batch, sampling: Sampling, repeats: int, steps: int
) -> float:
    """Seconds of a step that is launched while the one before it runs, as the engine does it;
    median of `repeats` times so many steps, the first of several left out."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        waits = [program.start(batch, lambda: sampling, 0, [], []) for _ in range(steps)]
        for wait in waits:
            wait()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times[1:] or times)


def time_steps(device: torch.device, *, smoke: bool) -> list[dict[str, Any]]:
    """Decode and prefill steps of whole models, sampling and the copy to the host included."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    plan: list[tuple[Dimensions, WeightFormat]] = [
        (LLAMA_1B, "bfloat16"),
        (QWEN_06B, "bfloat16"),
        (LLAMA_8B, "bfloat16"),
        (LLAMA_8B, "int4"),
    ]
    sizes, before, prefill, repeats = [1, 8, 64, 256], 512, 2048, 6
    if smoke:
        plan, sizes, before, prefill, repeats = [(TOY, "int4")], [2], 20, 8, 1
    found = []
    for model, weights in plan:
        ways = [(True, False)] if smoke else [(True, False), (False, False), (True, True)]
        for capture, invariant in ways:
            context = before + max(prefill, PAGE)
            decoding = -(-(before + PAGE) // PAGE) * max(sizes)
            program, backend = build(
                model,
                device,
                weights=weights,
                context=context,
                sequences=max(sizes),
                pages=max(decoding, -(-context // PAGE)) + 1,
                rows=max(prefill, *sizes),
                capture=capture,
                invariant=invariant,
            )
            batches = [(f"decode {n}", [1] * n) for n in sizes] + [("prefill", [prefill])]
            for name, counts in batches:
                batch = batch_of(counts, before, model.vocab)
                sampling, steps = greedy(len(counts)), 1 if smoke else 10
                seconds = seconds_of(program, batch, sampling, repeats, steps)
                bound = None
                if card is not None:
                    length = before + sum(counts) / len(counts) / 2
                    bound = step_seconds(
                        model, card, sum(counts), int(length), weights, len(counts)
                    )
                found.append(
                    {
                        "model": model.name,
                        "weights": weights,
                        "step": name,
                        "graphs": capture,
                        "invariant": invariant,
                        "seconds": seconds,
                        "tokens_per_second": sum(counts) / seconds,
                        "roofline_share": bound / seconds if bound else None,
                    }
                )
            backend.close()
            del program, backend
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def print_steps(steps: list[dict[str, Any]]) -> None:
    """The table of whole steps."""
    head = f"{'model':14} {'weights':9} {'step':11} {'graphs':9} {'ms':>9} {'tok/s':>9} roofline"
    print(head)
    for s in steps:
        share = f"{s['roofline_share']:7.0%}" if s["roofline_share"] else "       -"
        way = "invariant" if s["invariant"] else "on" if s["graphs"] else "off"
        print(
            f"{s['model']:14} {s['weights']:9} {s['step']:11} {way:9} "
            f"{s['seconds'] * 1e3:9.3f} {s['tokens_per_second']:9.0f} {share}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="kernels,steps,engine")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        parser.error("torch finds no NVIDIA GPU; --smoke tries the command without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = options.only.split(",")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    failed = 0
    if "kernels" in parts:
        result["checks"] = check_kernels(device, smoke=options.smoke)
        failed = sum(not check["ok"] for check in result["checks"])
        for check in result["checks"]:
            print(f"{'ok  ' if check['ok'] else 'FAIL'} {check['name']:40} {check['error']:.2e}")
        if not options.smoke:
            result["kernels"] = time_kernels(device)
            for line in result["kernels"]:
                print(line)
    if "steps" in parts:
        result["steps"] = time_steps(device, smoke=options.smoke)
        print_steps(result["steps"])
    if "engine" in parts:
        from perf import gpu_engine

        one = ["--model", LLAMA_1B.name, "--requests", "8", "--http", "--guesses"]
        loads = (
            [["--smoke", "--requests", "5", "--guesses"]] if options.smoke else [["--peer"], one]
        )
        result["engine"] = [gpu_engine.measure(load) for load in loads]
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    print(f"{name}: {failed} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
