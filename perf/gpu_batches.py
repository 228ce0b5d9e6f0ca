"""Steps for the GPU kernels' checks: chunks whose pages lie anywhere."""

from __future__ import annotations

import numpy as np

from kernels.batch import Batch

PAGE = 16


def batch_over_pages(counts: list[int], before: list[int]) -> Batch:
    """Chunks of `counts` tokens that follow `before` others each, in pages of their own."""
    width = max(-(-(c + b) // PAGE) for c, b in zip(counts, before, strict=True))
    pages = width * len(counts)
    table = np.random.default_rng(0).permutation(pages).reshape(len(counts), width)
    spans = [np.arange(b, b + c) for c, b in zip(counts, before, strict=True)]
    positions, rows = np.concatenate(spans), np.repeat(np.arange(len(counts)), counts)
    return Batch(
        token_ids=np.zeros(len(rows), np.int64),
        positions=positions,
        kv_slots=table[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        context_lengths=(np.array(counts) + before).astype(np.int32),
        table_rows=np.arange(len(counts), dtype=np.int32),
        page_table=table.astype(np.int32),
        sample_rows=np.zeros(0, np.int64),
    )
