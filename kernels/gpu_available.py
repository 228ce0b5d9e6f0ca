"""Whether a GPU can serve here; asks without importing what only a GPU needs."""

from __future__ import annotations

import importlib.util

import torch


def unavailable_reason() -> str | None:
    """Why Triton kernels cannot serve on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install 'ryzanstein[gpu]')"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None
