"""What a step hands to a device and gets back: flat arrays, no objects.

All arrays are numpy views into staging buffers that the runner fills and reuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass over `tokens` rows of `sequences` chunks.

    `token_ids`, `positions` int64 `[tokens]`; `kv_slots` int64 `[tokens]`, the flat cache slot
    (page * page_size + offset) each token's key and value go to; `query_starts` int32
    `[sequences + 1]`, first row of each chunk; `context_lengths` int32 `[sequences]`, tokens in the
    cache after this step's writes; `table_rows` int32 `[sequences]`, each chunk's row in
    `page_table` int32 `[slots, pages per sequence]`; `sample_rows` int64 `[samples]`, the token
    rows whose logits are wanted. A chunk may read what those right before it write in the same
    step, if they have the same `table_rows`, and nothing that others do.

    Layers that see a window only may have pages of their own, which need not be there for all of a
    sequence: `window_slots` and `window_table` are theirs, as the others are, and None where all
    layers share their pages. What the window does not reach is never used.

    Models that keep a state have each sequence's at its `table_rows`. `kept_rows` int32
    `[sequences]` says after how many of a chunk's rows it is also put at `kept_at` int32
    `[sequences]`; -1 is never. They are None where no model keeps a state.
    """

    token_ids: Int64
    positions: Int64
    kv_slots: Int64
    query_starts: Int32
    context_lengths: Int32
    table_rows: Int32
    page_table: Int32
    sample_rows: Int64
    kept_rows: Int32 | None = None
    kept_at: Int32 | None = None
    window_slots: Int64 | None = None
    window_table: Int32 | None = None


@dataclass(slots=True)
class Penalty:
    """One row's history for penalties: `counts` int32 `[vocab]` of generated tokens, and `seen`
    bool `[vocab]`, whether a token occurs in prompt or output."""

    row: int
    counts: Int32
    seen: Bool


@dataclass(slots=True)
class Sampling:
    """How to turn each logits row into a token; all arrays `[samples]` unless said otherwise.

    `targets` int64: -1 draws a token, any other value scores that given token (prompt logprobs).
    `temperature` 0 means greedy. `uniform` in [0, 1) is the row's only randomness, made by the
    caller from seed and position. `top_logprobs` int32: -1 wants no logprob, k >= 0 wants the
    chosen token's and the k best. `bias_*` are flat (row, token id, addend) triples; -inf forbids.
    `masks` int32 `[len(mask_rows), vocab / 32, rounded up]` have a bit, the lowest first, for each
    token that a row may draw.
    """

    targets: Int64
    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    uniform: npt.NDArray[np.float64]
    top_logprobs: Int32
    repetition_penalty: Float32
    presence_penalty: Float32
    frequency_penalty: Float32
    bias_rows: Sequence[int] = ()
    bias_ids: Sequence[int] = ()
    bias_values: Sequence[float] = ()
    penalties: Sequence[Penalty] = ()
    mask_rows: Sequence[int] = ()
    masks: Int32 | None = None

    @property
    def edited(self) -> bool:
        """Whether any row is drawn from other than the model's own logits."""
        return bool(self.bias_rows or self.penalties or self.mask_rows)

    @property
    def drawn(self) -> bool:
        """Whether any row depends on `uniform`."""
        return bool(self.temperature.any())

    def with_uniform(self, uniform: npt.NDArray[np.float64]) -> Sampling:
        """The same with other draws."""
        return replace(self, uniform=uniform)


@dataclass(slots=True)
class Samples:
    """What a step drew, one entry per logits row.

    `logprobs[i]` is None unless wanted; `top[i]` holds (token id, logprob) pairs, best first.
    Logprobs are of the model's raw distribution, before bias, penalties and temperature.
    """

    ids: list[int]
    logprobs: list[float | None] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)


def counter_uniform(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Uniform draws in [0, 1) that depend on (seed, position) alone, never on the batch.

    A counter-based generator: two rounds of SplitMix64's finalizer (Steele et al., OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        x = seeds + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
