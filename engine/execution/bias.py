"""What requests add to their logits."""

from __future__ import annotations

from engine.scheduling.sequence import Sequence


def add_bias(
    sequence: Sequence,
    row: int,
    generated: int,
    bias: tuple[list[int], list[int], list[float]],
) -> None:
    """The request's logit bias, and no end of sequence before `min_tokens`."""
    sampling = sequence.request.sampling
    addends = dict(sampling.logit_bias)
    if generated < sampling.min_tokens:
        ends = {*sampling.stop_token_ids, *sequence.request.eos_token_ids}
        addends.update(dict.fromkeys(ends, float("-inf")))
    bias[0].extend([row] * len(addends))
    bias[1].extend(addends)
    bias[2].extend(addends.values())
