"""Window pages on the GPU backend, as they are moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.kernels.gpu.filled import program_of
from tests.tiny import SLIDING, write_llama


def test_window_pages_are_moved_and_rounded_by_themselves(tmp_path: Path) -> None:
    _, backend = program_of(write_llama(tmp_path, **SLIDING), pages=9, window_pages=5)
    windows = backend.pages(windowed=True)
    assert windows.page_bytes == backend.pages().page_bytes
    values = torch.randn(windows.page_bytes // 4, generator=torch.Generator().manual_seed(0))
    windows.write(values.view(torch.uint8).numpy(), 3)
    windows.copy(3, 1)
    block = np.zeros(windows.page_bytes, np.uint8)
    windows.read(1, block)
    again = torch.from_numpy(block).view(torch.float32)
    assert (again == values).all()
    codec = backend.page_codec("int8", windowed=True)
    narrow = np.zeros(codec.page_bytes, np.uint8)
    codec.compress(1, narrow)
    codec.restore(narrow, 4)
    windows.read(4, block)
    assert 0 < (again - values).abs().max() < values.abs().max() / 200
