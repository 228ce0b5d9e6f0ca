"""A float model as one in 4 bits, which every backend reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as to_blocks

from engine.compression.calibration import calibrated
from engine.compression.fit import GROUP, gptq, plain
from engine.compression.folder import Progress, finite, open_floats, write_model
from engine.weights import blocks
from engine.weights.safetensors import SafetensorsCheckpoint

VOCABULARY = (
    "model.embed_tokens.weight",
    "model.embed_tokens_per_layer.weight",
    "lm_head.weight",
)
# What guesses tokens further ahead, which nobody loads.
AHEAD = "mtp."
# What chooses experts, or says how much of them or of a state counts, is not rounded.
UNROUNDED = (
    "mlp.gate.weight",
    "mlp.router.weight",
    "block_sparse_moe.gate.weight",
    "e_score_correction_bias",
    "shared_expert_gate.weight",
    "linear_attn.in_proj_a.weight",
    "linear_attn.in_proj_b.weight",
    "linear_attn.in_proj_ba.weight",
)


def quantize(
    source: Path, target: Path, windows: Sequence[Sequence[int]], progress: Progress
) -> None:
    """Write the model of folder `source` to the new folder `target`: linears as Q4_1, table and
    head as Q8_0, all else as it is. With `windows`, token ids of a text, linears are fitted to what
    they are given there. Raises ConfigError if the source is no float model, or the target is
    there."""
    checkpoint = open_floats(source)
    changes = {"quantization_config": {"quant_method": blocks.METHOD}}
    write_model(checkpoint, target, changes, _tensors(checkpoint, windows, progress))


def _tensors(
    checkpoint: SafetensorsCheckpoint, windows: Sequence[Sequence[int]], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors as they are stored, the calibrated linears first."""
    left = {name for name in checkpoint.names() if not name.startswith(AHEAD)}
    total = len(left)
    fitted = calibrated(checkpoint, windows, _is_fitted, progress) if windows else iter(())
    for linear in fitted:
        # Some tensors hold rows of several linears of one input.
        for name in [name for name in dict.fromkeys(linear.names) if name in left]:
            left.discard(name)
            yield f"{name}.q4_1", gptq(finite(checkpoint, name).float(), linear.inputs).blocks()
        progress("quantize", total - len(left), total)
    for name in sorted(left):
        left.discard(name)
        tensor = finite(checkpoint, name)
        matrix = tensor.dim() == 2 and tensor.shape[1] % GROUP == 0
        if not matrix or name.endswith(UNROUNDED):
            yield name, tensor
        elif name in VOCABULARY:
            rows = to_blocks(tensor.float().numpy(), GGMLQuantizationType.Q8_0)
            yield f"{name}.q8_0", torch.from_numpy(rows)
        else:
            yield f"{name}.q4_1", plain(tensor.float()).blocks()
        progress("quantize", total - len(left), total)


def _is_fitted(name: str, inputs: int) -> bool:
    return inputs % GROUP == 0 and name not in VOCABULARY and not name.endswith(UNROUNDED)
