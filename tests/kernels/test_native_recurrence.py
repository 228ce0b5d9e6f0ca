"""Layers that keep states, on the native kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import CacheLayout, select_backend
from kernels.batch import Batch
from kernels.cpu.native_backend import NativeBackend
from kernels.ops import DeltaHeads, Heads
from kernels.tape import Recorder
from tests.kernels.native import INSTRUCTION_SETS, chunks_batch, needs_native, program_of
from tests.tiny import CONV, DELTA, write_llama

pytestmark = needs_native
SIZE = 16
TABLES = np.random.default_rng(0).permutation(40).reshape(4, 10).astype(np.int32)
# Tokens of each chunk and where they start, step by step: prompts in pieces, beside decodes.
STEPS = [
    ([9, 1, 5], [0, 0, 0]),
    ([1, 1, 30], [9, 1, 5]),
    ([2, 1, 1, 7], [10, 2, 35, 0]),
]
SHAPES: dict[str, dict[str, Any]] = {
    "tiles": {"linear_value_head_dim": 64, "linear_key_head_dim": 32},
    "no whole tile": {"linear_value_head_dim": 48, "linear_key_head_dim": 48},
    "two taps": {"linear_conv_kernel_dim": 2},
    "many taps": {"linear_conv_kernel_dim": 11},
    "a key head each": {"linear_num_value_heads": 2},
    "in turns": {"linear_tiled_value_heads": True},
    "convolutions": CONV,
    "convolutions of many taps": CONV | {"conv_L_cache": 7},
    "narrow convolutions": CONV | {"hidden_size": 48, "head_dim": 16},
}
both = pytest.mark.parametrize("kind", [DELTA, CONV], ids=["delta nets", "convolutions"])


def steps() -> list[Batch]:
    rng = np.random.default_rng(1)
    return [
        chunks_batch(
            [rng.integers(0, 260, count).tolist() for count in counts], starts, TABLES, SIZE
        )
        for counts, starts in STEPS
    ]


def logits_of(program: Any, batches: list[Batch]) -> torch.Tensor:
    found = []
    for batch in batches:
        program.forward(batch)
        found.append(program.logits().clone())
    return torch.cat(found)


def reference_logits(folder: Path) -> torch.Tensor:
    backend, _ = select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(folder), backend)
    backend.allocate_cache(cache_layout(model, SIZE, "float32"), 40, states=8)
    recorder = Recorder()
    return logits_of(backend.compile(recorder.finish(model.forward(recorder)), 512), steps())


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_references_logits(
    tmp_path: Path, shape: str, instructions: str
) -> None:
    changes = SHAPES[shape]
    folder = write_llama(tmp_path, **(changes if "model_type" in changes else DELTA | changes))
    wanted = reference_logits(folder)
    program, _ = program_of(folder, weights="float32", cache="float32", instructions=instructions)
    found = logits_of(program, steps())
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@both
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_neither_company_nor_threads_nor_pieces_change_a_bit(
    tmp_path: Path, kind: dict[str, Any], weights: str
) -> None:
    folder = write_llama(tmp_path, **kind)
    tokens = np.random.default_rng(2).integers(0, 260, 70).tolist()
    programs = [program_of(folder, threads=n, weights=weights)[0] for n in (1, 2)]
    alone = logits_of(programs[0], [chunks_batch([tokens], [0], TABLES[:1], SIZE)])
    for pieces in ([70], [1, 2, 3, 64], [1] * 70):
        start, found = 0, []
        for count in pieces:
            others = [tokens[:5], tokens[:1]]
            batch = chunks_batch(
                [tokens[start : start + count], *others], [start, 0, 0], TABLES[:3], SIZE
            )
            programs[1].forward(batch)
            found.append(programs[1].logits()[:count].clone())
            start += count
        assert torch.equal(torch.cat(found), alone), pieces


@both
@pytest.mark.parametrize("kept", [0, 1, 2, 3, 20])
def test_a_state_that_was_kept_is_gone_on_from(
    tmp_path: Path, kind: dict[str, Any], kept: int
) -> None:
    folder = write_llama(tmp_path, **kind)
    backend = NativeBackend("float32", 2)
    model = load_model(open_checkpoint(folder), backend)
    backend.allocate_cache(cache_layout(model, SIZE, "float32", 512), 40, states=3)
    recorder = Recorder()
    program = backend.compile(recorder.finish(model.forward(recorder)), 512)
    tokens = np.random.default_rng(3).integers(0, 260, 40).tolist()

    def run(first: int, last: int, table: int = 0, **keeping: Any) -> torch.Tensor:
        batch = chunks_batch([tokens[first:last]], [first], TABLES[table : table + 1], SIZE)
        return logits_of(program, [replace(batch, **keeping)])

    run(0, 10)
    places = {"kept_rows": np.array([kept], np.int32), "kept_at": np.array([2], np.int32)}
    expected = torch.cat((run(10, 30, **places), run(30, 40)))
    run(0, 12, table=1)  # another takes the slot
    backend.states().copy(2, 0)
    assert torch.equal(run(10 + kept, 40), expected[kept:])


def test_shapes_that_the_kernels_do_not_take_are_refused() -> None:
    backend = NativeBackend("float32", 1)
    layout = CacheLayout((Heads(1, 1, 16),), 16, "float32", 16, DeltaHeads(1, 1, 8, 16, 4), 1)
    backend.allocate_cache(layout, 1, states=1)
    states = backend._native_states(backend._states[0])
    program = backend._native.Program(backend.device, 1, None)
    with pytest.raises(ValueError, match="do not take this shape of states"):
        program.add_states(states)
