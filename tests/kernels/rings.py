"""Steps of sequences whose window pages are used again as soon as the window has left them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kernels.backend import Program
from tests.kernels.native import chunks_batch

SIZE = 16
CONTEXT = 128
# Window pages of a sequence: for a window of 40 and a chunk.
RING = 5
SEQUENCES = 2
PAGES = SEQUENCES * CONTEXT // SIZE + 1
WINDOW_PAGES = SEQUENCES * RING + 1
CHUNKS = [13, 16, 1, 16, 16, 16, 1, 9]


def ring_logits(program: Program, *, windowed: bool) -> list[torch.Tensor]:
    """The logits of every row, step by step; `windowed` programs keep a window only."""
    rng = np.random.default_rng(4)
    tables = rng.permutation(PAGES - 1)[: SEQUENCES * CONTEXT // SIZE].reshape(SEQUENCES, -1)
    rings = rng.permutation(WINDOW_PAGES - 1).reshape(SEQUENCES, RING)
    rings = np.tile(rings, 2)[:, : tables.shape[1]].copy()
    found, start = [], 0
    for count in CHUNKS:
        tokens = [rng.integers(0, 60, count).tolist() for _ in range(SEQUENCES)]
        starts = [start] * SEQUENCES
        batch = chunks_batch(tokens, starts, tables, SIZE)
        if windowed:
            near = chunks_batch(tokens, starts, rings, SIZE)
            batch = replace(batch, window_slots=near.kv_slots, window_table=near.page_table)
        program.forward(batch)
        found.append(program.logits().clone())
        start += count
    assert start > 2 * 40
    return found
