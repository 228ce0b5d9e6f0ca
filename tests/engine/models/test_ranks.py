"""Several ranks compute what one does: every family, on tiny random models, and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kernels.collectives import Place
from tests.engine.models.test_parity import COMMON, FAMILIES, randomize
from tests.kernels.native import needs_native
from tests.ranks import logits_of, on_ranks, program_of
from tests.real import smollm2_path

TOKENS = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1)).tolist()
CHUNKS = [17, 1, 1, 30, 11]
# Heads that divide by no number of ranks, and more ranks than key/value heads.
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 52}
UNEVEN |= {"hidden_size": 96}


def tiny(folder: Path, family: str, **changes: Any) -> Path:
    name, more = FAMILIES[family]
    config = getattr(transformers, name)(**(COMMON | more | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp(request.param), request.param)


def on_one_and(
    path: Path, backend: str, ranks: int, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of one rank, and those of each of several."""

    def run(place: Place | None) -> torch.Tensor:
        program, _ = program_of(path, backend, place, **options)
        return logits_of(program, TOKENS, CHUNKS)

    return run(None), on_ranks(ranks, run)


def check_close(one: torch.Tensor, several: list[torch.Tensor]) -> None:
    assert all(torch.equal(several[0], logits) for logits in several), "ranks differ"
    assert float((several[0] - one).abs().max() / one.abs().max()) < 1e-4


@needs_native
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_ranks_equal_one_in_every_family(family: Path, backend: str, ranks: int) -> None:
    check_close(*on_one_and(family, backend, ranks))


@needs_native
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bitnet", "olmo2"])
def test_heads_and_widths_need_not_divide_evenly(tmp_path: Path, name: str, ranks: int) -> None:
    path = tiny(tmp_path, name, **UNEVEN)
    check_close(*on_one_and(path, "native", ranks))


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_exact_ranks_compute_the_very_bits_of_one(family: Path, dtype: str) -> None:
    one, several = on_one_and(family, "native", 2, exact=True, dtype=dtype)
    assert all(torch.equal(one, logits) for logits in several)


@needs_native
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_quantized_ranks_differ_from_one_by_the_order_of_sums_alone(
    family: Path, dtype: str
) -> None:
    """Weights and activations are cut between their groups, so both are rounded as on one rank; a
    sum that comes out another way may be rounded to another neighbour in the next layer."""
    one, several = on_one_and(family, "native", 2, dtype=dtype)
    assert float((several[0] - one).norm() / one.norm()) < 0.02


@needs_native
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_smollm2_on_ranks(ranks: int, exact: bool) -> None:
    """Nine heads over three key/value heads: on two ranks they split unevenly, on four two ranks
    share a head."""
    one, several = on_one_and(smollm2_path(), "native", ranks, exact=exact)
    check_close(one, several)
    assert not exact or torch.equal(one, several[0])
