"""BitNet b1.58 checkpoints in their published layouts, against `transformers`' own linears."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import BitNetQuantConfig

from engine.errors import ConfigError
from engine.models import load_model
from engine.weights.bitnet import read_layout, unpack_rows
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from tests.engine.models.test_parity import COMMON, run
from tests.kernels.native import INSTRUCTION_SETS, logits_in_chunks, needs_native, program_of

with warnings.catch_warnings():
    # Its decorators import the machinery of torch.compile, where torch warns about itself.
    warnings.simplefilter("ignore")
    from transformers.integrations.bitnet import (
        AutoBitLinear,
        BitLinear,
        pack_weights,
        replace_with_bitnet_linear,
    )

LAYOUTS = {
    "packed, divided by its scale": ("bitlinear", "offline", True),
    "packed, times its scale": ("autobitlinear", "offline", True),
    "plain signs, times its scale": ("autobitlinear", "offline", False),
    "float weights": ("autobitlinear", "online", False),
}


def write_bitnet(folder: Path, kind: str, mode: str, packed: bool) -> torch.nn.Module:
    """A tiny random model, saved as published ones are; returns `transformers`' model of it."""
    config = transformers.BitNetConfig(**(COMMON | {"hidden_size": 64, "hidden_act": "relu2"}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    quantization = BitNetQuantConfig(linear_class=kind, quantization_mode=mode)
    model = replace_with_bitnet_linear(model, ["lm_head"], quantization)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    for module in model.modules():
        if isinstance(module, BitLinear):
            signs = torch.randint(-1, 2, (module.out_features, module.in_features))
            module.weight, module.weight_scale = pack_weights(signs), torch.rand(1) + 0.5
        elif isinstance(module, AutoBitLinear) and mode == "offline":
            module.weight.data = torch.randint(-1, 2, module.weight.shape).float()
            module.weight_scale = torch.rand(1) + 0.5
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if packed:
        for name in [n for n in state if n.endswith("_proj.weight")]:
            if state[name].dtype != torch.uint8:
                state[name] = pack_weights(state[name])
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    described = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": mode}
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": described})
    )
    return model


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    """A saved model, and the logits that `transformers` gives for TOKENS."""
    folder = tmp_path_factory.mktemp("bitnet") / "model"
    model = write_bitnet(folder, *LAYOUTS[request.param])
    torch.compiler.set_stance("force_eager")  # its linears would be compiled with g++
    try:
        with torch.no_grad():
            return folder, model(torch.tensor([TOKENS])).logits[0]
    finally:
        torch.compiler.set_stance("default")


TOKENS = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1)).tolist()


def errors_of(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each position, relative to the largest logit."""
    return (logits - expected).abs().amax(-1) / expected.abs().max()


def assert_equal_but_for_ties(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """An activation that lies halfway between two int8 values may be rounded either way, which
    shows at its own position and, through attention, a little at those behind it."""
    errors = errors_of(logits, expected)
    assert float(errors[:8].median()) < 1e-5
    assert float((errors < 1e-5).float().mean()) > 0.25
    assert float(errors.max()) < 0.03


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_logits_equal_transformers(pair: tuple[Path, torch.Tensor], backend: str) -> None:
    folder, expected = pair
    assert_equal_but_for_ties(run(folder, backend, [17, 1, 42], TOKENS), expected)


@needs_native
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_the_ternary_kernels_equal_transformers(
    pair: tuple[Path, torch.Tensor], instructions: str
) -> None:
    folder, expected = pair
    options: Any = {"weights": "float32", "cache": "float32", "instructions": instructions}
    program, _ = program_of(folder, **options)
    whole = logits_in_chunks(program, TOKENS, [60])
    assert_equal_but_for_ties(whole, expected)
    chunked, _ = program_of(folder, threads=1, **options)
    assert torch.equal(logits_in_chunks(chunked, TOKENS, [17, 1, 42]), whole)


@needs_native
def test_the_default_formats_stay_close(pair: tuple[Path, torch.Tensor]) -> None:
    """bfloat16 head and cache, as a user would serve it."""
    folder, expected = pair
    program, _ = program_of(folder)
    assert float(errors_of(logits_in_chunks(program, TOKENS, [60]), expected).max()) < 0.12


class Stored:
    """A tensor as safetensors gives it: sliced, and asked for its shape."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self._tensor[part]


@pytest.mark.parametrize(("first", "last"), [(0, 12), (0, 3), (2, 9), (11, 12)])
def test_unpacking_undoes_the_published_packing(first: int, last: int) -> None:
    """Of any rows, wherever they lie in the bytes."""
    signs = torch.randint(-1, 2, (12, 7))
    stored = Stored(pack_weights(signs.clone()))
    assert torch.equal(unpack_rows(stored, "w", first, last), signs[first:last].to(torch.int8))


def test_what_is_no_bitnet_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    for described, message in (
        ({"linear_class": "other"}, "class 'other'"),
        ({"quantization_mode": "sometimes"}, "mode 'sometimes'"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_layout(described)
    with pytest.raises(ConfigError, match=r"'w' holds a code that is no ternary value"):
        unpack_rows(Stored(torch.full((2, 2), 255, dtype=torch.uint8)), "w", 0, 8)


def test_a_missing_or_senseless_scale_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_bitnet(folder, "bitlinear", "offline", packed=True)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for scale, message in ((None, "no weight_scale"), (torch.zeros(1), "not one positive")):
        changed = {n: t for n, t in state.items() if n != f"{name}_scale"}
        if scale is not None:
            changed[f"{name}_scale"] = scale
        save_file(changed, folder / "model.safetensors")
        backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
        with pytest.raises(ConfigError, match=message):
            load_model(open_checkpoint(folder), backend)
