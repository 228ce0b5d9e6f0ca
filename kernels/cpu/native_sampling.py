"""Picks tokens of logits by native kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.batch import Sampling
from kernels.sampling import Rows


class NativeChooser:
    """Picks tokens of logits rows, rows shared among the pool's threads."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __call__(self, logits: torch.Tensor, rows: Rows, sampling: Sampling) -> Rows:
        ids = np.empty(len(rows), np.int64)
        edits, _kept = _edits(sampling)
        self._device.choose(
            logits.data_ptr(),
            logits.shape[1],
            address(rows),
            len(rows),
            address(sampling.temperature),
            address(sampling.top_k),
            address(sampling.top_p),
            address(sampling.min_p),
            address(sampling.uniform),
            address(ids),
            edits,
        )
        return ids


def _edits(sampling: Sampling) -> tuple[list[tuple[Any, ...]], list[npt.NDArray[Any]]]:
    """The rows' edits as addresses, and the arrays that these lead to."""
    biases: dict[int, tuple[list[int], list[float]]] = {}
    for row, token, addend in zip(
        sampling.bias_rows, sampling.bias_ids, sampling.bias_values, strict=True
    ):
        ids, addends = biases.setdefault(row, ([], []))
        ids.append(token)
        addends.append(addend)
    penalties = {penalty.row: penalty for penalty in sampling.penalties}
    # Looking up an address costs more than all else here; masks lie side by side.
    masks = dict[int, int]()
    if sampling.masks is not None:
        first, stride = address(sampling.masks), sampling.masks.strides[0]
        masks = {row: first + stride * place for place, row in enumerate(sampling.mask_rows)}
    edits: list[tuple[Any, ...]] = []
    kept: list[npt.NDArray[Any]] = []
    for row in biases.keys() | penalties.keys() | masks.keys():
        bias, penalty = (0, 0, 0), (0, 0, 0.0, 0.0, 0.0)
        if row in biases:
            ids, addends = biases[row]
            tokens, values = np.array(ids, np.int64), np.array(addends, np.float32)
            kept += [tokens, values]
            bias = (address(tokens), address(values), len(ids))
        if history := penalties.get(row):
            penalty = (
                address(history.counts),
                address(history.seen),
                float(sampling.repetition_penalty[row]),
                float(sampling.presence_penalty[row]),
                float(sampling.frequency_penalty[row]),
            )
        edits.append((row, *bias, *penalty, masks.get(row, 0)))
    return edits, kept


def address(array: np.ndarray[Any, Any]) -> int:
    assert array.flags.c_contiguous, "the kernels read plain arrays"
    return array.ctypes.data
