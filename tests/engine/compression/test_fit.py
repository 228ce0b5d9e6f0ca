"""A matrix in four bits: what is kept, and what calibration makes better."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from engine.compression.fit import Inputs, gptq, plain


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean())


def test_groups_are_fitted_better_than_by_their_extremes() -> None:
    weight = random(48, 256)
    extremes = gguf.dequantize(gguf.quantize(weight.numpy(), Type.Q4_1), Type.Q4_1)
    usual = error(torch.from_numpy(extremes), weight)
    assert error(plain(weight).values(), weight) < 0.93 * usual


def test_what_four_bits_hold_is_kept() -> None:
    held = gguf.dequantize(gguf.quantize(random(16, 64).numpy(), Type.Q4_1), Type.Q4_1)
    assert torch.allclose(plain(torch.from_numpy(held)).values(), torch.from_numpy(held), atol=2e-3)
    assert not plain(torch.zeros(4, 32)).values().any()


def test_blocks_are_ggmls() -> None:
    found = plain(random(5, 96))
    values = gguf.dequantize(found.blocks().numpy(), Type.Q4_1)
    assert np.array_equal(values, found.values().numpy())


def test_inputs_that_vary_together_let_errors_be_made_good() -> None:
    weight = random(64, 160)
    inputs = random(2000, 24, seed=1) @ random(24, 160, seed=2) + random(2000, 160, seed=3)
    wanted = inputs @ weight.T
    simple = error(inputs @ plain(weight).values().T, wanted)
    fitted = error(inputs @ gptq(weight, Inputs(inputs.T @ inputs, 2000)).values().T, wanted)
    assert fitted < 0.4 * simple


def test_inputs_that_vary_apart_change_nothing() -> None:
    weight = random(8, 64)
    found = gptq(weight, Inputs(torch.eye(64) * 7, 64))
    assert torch.equal(found.values(), plain(weight).values())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, inputs = random(8, 64), random(300, 64)
    inputs[:, 10:20] = 0.0
    values = gptq(weight, Inputs(inputs.T @ inputs, 300)).values()
    assert values.isfinite().all()
    assert error(inputs @ values.T, inputs @ weight.T) < 0.5


def test_few_rows_are_trusted_less() -> None:
    """Inputs that vary apart, of which there are few: what they seem to share is chance."""
    weight, inputs, others = random(32, 128), random(150, 128), random(4000, 128, seed=3)
    products = inputs.T @ inputs
    careful, trusting = (
        error(others @ gptq(weight, Inputs(products, rows)).values().T, others @ weight.T)
        for rows in (150, 100_000)
    )
    assert careful < 0.9 * trusting


def test_inputs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="its inputs are not finite"):
        gptq(random(4, 32), Inputs(torch.full((32, 32), torch.nan), 100))
