"""A step's sampling on the device: parameters sent, edits applied, ids brought back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.batch import Sampling
from kernels.gpu.sampling import Sampler, SamplerShape, penalize
from kernels.gpu.staging import Mirror
from kernels.sampling import forbid

FLOATS, INTS = slice(0, 3), slice(3, 8)


class Draws:
    """Draws for up to `rows` rows over a vocabulary; drawn ids also go to `last_ids`."""

    def __init__(self, rows: int, vocab: int, last_ids: torch.Tensor, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._last_ids = last_ids
        self._sampler = Sampler(SamplerShape(rows, vocab), device)
        self._mirror = Mirror(torch.zeros(8, rows, dtype=torch.int32), device)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)

    def draw(
        self,
        logits: torch.Tensor,
        sampling: Sampling,
        replay: Callable[[int, bool], None],
        drawn: Sequence[int] = (),
        slots: Sequence[int] = (),
    ) -> torch.Tensor:
        """Ids, int64 on the device, of the first rows of `logits`; those of the rows `drawn` also
        go to `last_ids`, at `slots`. `replay` launches for so many rows of these logits, with or
        without filters, unless edits make it others."""
        count = len(sampling.targets)
        self._send(sampling, count, drawn, slots)
        limits = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        filtered = bool((limits & (sampling.temperature > 0)).any())
        if sampling.edited:
            self.launch(count, self._edited(logits[:count], sampling), filtered=filtered)
        else:
            replay(count, filtered)
        return self._ids[:count]

    def warm_up(self, logits: torch.Tensor) -> None:
        """Compile what only some steps launch: penalties."""
        history = np.zeros((2, logits.shape[1]), np.int32)
        self._penalize(logits[:1].clone(), [0], history[:1], history[1:] > 0, np.ones((1, 4)))

    def launch(self, rows: int, logits: torch.Tensor, *, filtered: bool) -> None:
        """All kernels of a draw, with the parameters that were sent last."""
        parameters = self._mirror.device
        floats, ints = parameters[FLOATS].view(torch.float32), parameters[INTS]
        sampler, ids = self._sampler, self._ids
        sampler.draw(rows, logits, floats, ints, ids, self._last_ids, filtered=filtered)

    def _send(
        self, sampling: Sampling, count: int, drawn: Sequence[int], slots: Sequence[int]
    ) -> None:
        self._mirror.wait()
        numbers = self._mirror.numbers
        floats = numbers.view(np.float32)
        floats[0, :count] = sampling.temperature
        floats[1, :count] = sampling.top_p
        floats[2, :count] = sampling.min_p
        numbers[3, :count] = np.where(sampling.top_k < self._vocab, sampling.top_k, 0)
        numbers[4, :count] = sampling.targets
        numbers[5, :] = -1
        numbers[5, drawn] = slots
        # The best token alone is what a greedy row takes.
        floats[0, :count][sampling.top_k == 1] = 0.0
        # The row's random number, 53 bits, as two words: the key of its noise.
        bits = (sampling.uniform * 2.0**53).astype(np.uint64)
        pairs = numbers[6:].reshape(-1)[: 2 * count].view(np.uint32)
        pairs[0::2], pairs[1::2] = bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)
        self._mirror.send()

    def _edited(self, logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """A copy of the logits with biases, penalties and masks."""
        logits, device = logits.clone(), self._device
        if sampling.bias_rows:
            rows = torch.tensor(sampling.bias_rows, device=device)
            ids = torch.tensor(sampling.bias_ids, device=device)
            addends = torch.tensor(sampling.bias_values, dtype=torch.float32, device=device)
            logits.index_put_((rows, ids), addends, accumulate=True)
        if sampling.penalties:
            where = [penalty.row for penalty in sampling.penalties]
            counts = np.stack([penalty.counts for penalty in sampling.penalties])
            seen = np.stack([penalty.seen for penalty in sampling.penalties])
            factors = np.stack(
                (
                    sampling.repetition_penalty[where],
                    sampling.presence_penalty[where],
                    sampling.frequency_penalty[where],
                    np.zeros(len(where)),
                ),
                axis=1,
            )
            self._penalize(logits, where, counts, seen, factors)
        if sampling.masks is not None:
            forbid(logits, sampling.mask_rows, torch.from_numpy(sampling.masks))
        return logits

    def _penalize(
        self,
        logits: torch.Tensor,
        rows: list[int],
        counts: npt.NDArray[np.int32],
        seen: npt.NDArray[np.bool_],
        factors: npt.NDArray[Any],
    ) -> None:
        device = self._device
        penalize(
            logits,
            torch.tensor(rows, device=device),
            torch.from_numpy(counts).to(device),
            torch.from_numpy(seen.view(np.int8)).to(device),
            torch.from_numpy(factors.astype(np.float32)).to(device),
        )
