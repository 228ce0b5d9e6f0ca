"""A float model with narrower feed-forward layers: neurons that a text hardly needs are left out.

Which of a layer's neurons go, and what the others take over, follows from the inputs of its last
linear. Leaving one out costs least where the inverse of x^T x says that the others know what it
would say (Optimal Brain Surgeon; for whole neurons ZipLM, arXiv 2302.04089, which takes them one by
one, where here all go at once); the weights of those that stay are then fitted again, so that the
layer's outputs change least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.compression.calibration import calibrated
from engine.compression.fit import Inputs
from engine.compression.folder import Progress, finite, open_floats, write_model
from engine.errors import ConfigError
from engine.models.config import read_config
from engine.weights.safetensors import SafetensorsCheckpoint

# Widths stay multiples of it: groups of four bits, and their cuts among ranks.
UNIT = 32
LAST = "mlp.down_proj.weight"


def prune(
    source: Path,
    target: Path,
    keep: float,
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> int:
    """Write the model of folder `source` to the new folder `target` with a share `keep` of each
    layer's neurons, chosen and fitted for `windows`, token ids of a text. Returns the new width.

    Raises ConfigError if the source has no layers that can be narrowed, or the target is there.
    """
    checkpoint = open_floats(source)
    config = read_config(checkpoint.config, checkpoint.rope_factors())
    if config.experts is not None or config.inner_norms:
        raise ConfigError(f"{source}: experts and BitNet's layers cannot be narrowed")
    if not 0.0 < keep < 1.0:
        raise ConfigError(f"{keep} is no share of the neurons; say one between 0 and 1, like 0.8")
    width = max(UNIT, round(config.intermediate * keep / UNIT) * UNIT)
    if width >= config.intermediate:
        raise ConfigError(f"{keep} of {config.intermediate} neurons are all, in steps of {UNIT}")
    tensors = _tensors(checkpoint, config.intermediate, width, windows, progress)
    write_model(checkpoint, target, {"intermediate_size": width}, tensors)
    return width


def _tensors(
    checkpoint: SafetensorsCheckpoint,
    wide: int,
    width: int,
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The narrowed layers' tensors, `width` of `wide` neurons or as many times more as a layer has,
    then the others."""
    left = checkpoint.names()
    total = len(left)
    for linear in calibrated(checkpoint, windows, _is_last, progress):
        (name,) = linear.names
        block = name.removesuffix("down_proj.weight")
        last = finite(checkpoint, name)
        chosen = neurons(last.float(), linear.inputs, last.shape[1] // wide * width)
        yield name, refitted(last.float(), linear.inputs, chosen).to(last.dtype)
        left.discard(name)
        for part in ("gate_proj", "up_proj"):
            for kind in ("weight", "bias"):
                if (other := f"{block}{part}.{kind}") in left:
                    yield other, finite(checkpoint, other)[chosen]
                    left.discard(other)
        progress("prune", total - len(left), total)
    for name in sorted(left):
        yield name, finite(checkpoint, name)
    progress("prune", total, total)


def _is_last(name: str, inputs: int) -> bool:
    return name.endswith(LAST)


def neurons(weight: torch.Tensor, inputs: Inputs, width: int) -> torch.Tensor:
    """The `width` inputs of `weight`, fp32 `[out, in]`, that are missed most, in order."""
    # The diagonal of the inverse that this is the factor of.
    diagonal = inputs.upper.square().sum(0)
    missed = weight.square().sum(0) / diagonal
    return missed.topk(width).indices.sort().values


def refitted(weight: torch.Tensor, inputs: Inputs, chosen: torch.Tensor) -> torch.Tensor:
    """The weight of the `chosen` inputs that comes closest to what all of them gave,
    `[out, width]`: least squares over the inputs as they occur."""
    products = inputs.damped()
    factor = torch.linalg.cholesky(products[chosen][:, chosen])
    return torch.cholesky_solve(products[chosen] @ weight.T, factor).T
