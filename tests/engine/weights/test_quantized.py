"""Checkpoints that others have quantized: what is read is what was stored, in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.weights.checkpoint import open_checkpoint
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import check_close, on_one_and
from tests.kernels.native import needs_native
from tests.tiny import EXPERTS, write_llama

Tensors = dict[str, torch.Tensor]
GROUP = 64
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
TOKENS = list(range(3, 63))
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which output a word's nibbles hold, the lowest first


def words_of(numbers: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Numbers `[n, columns]` packed along their columns, int32 `[n, columns * bits / 32]`."""
    each = 32 // bits
    shape = (len(numbers), numbers.shape[1] // each)
    packed = torch.zeros(shape, dtype=torch.int64)
    for place in range(each):
        chosen = numbers[:, order[place] if order else place :: each]
        packed |= chosen.long() << bits * place
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


@dataclass(frozen=True)
class Parts:
    """What a matrix is stored by: numbers `[out, in]`, scales and zeros `[out, groups]`."""

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def values(self) -> torch.Tensor:
        group = self.numbers.shape[1] // self.scales.shape[1]
        scales = self.scales.float().repeat_interleave(group, 1)
        return (self.numbers - self.zeros.repeat_interleave(group, 1)).float() * scales


def parts_of(weight: torch.Tensor, bits: int, *, middle: bool) -> Parts:
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    groups, most = columns // GROUP, 1 << bits
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) * (2.0 / most)
    if middle:
        zeros = torch.full((rows, groups), most // 2)
    else:
        zeros = torch.randint(1, most, (rows, groups), generator=generator)
    numbers = torch.randint(0, most, (rows, columns), generator=generator)
    return Parts(numbers, scales.half(), zeros)


def gptq(name: str, weight: torch.Tensor, bits: int = 4, *, newer: bool = False) -> Any:
    parts = parts_of(weight, bits, middle=bits == 8)
    order = torch.arange(weight.shape[1]) // GROUP
    stored = {
        f"{name}.qweight": words_of(parts.numbers, bits).T,
        f"{name}.qzeros": words_of(parts.zeros.T - (0 if newer else 1), bits),
        f"{name}.scales": parts.scales.T,
        f"{name}.g_idx": order.to(torch.int32),
    }
    return stored, parts.values()


def awq(name: str, weight: torch.Tensor) -> Any:
    parts = parts_of(weight, 4, middle=False)
    stored = {
        f"{name}.qweight": words_of(parts.numbers.T, 4, AWQ_ORDER),
        f"{name}.qzeros": words_of(parts.zeros.T, 4, AWQ_ORDER),
        f"{name}.scales": parts.scales.T,
    }
    return stored, parts.values()


def compressed(name: str, weight: torch.Tensor, bits: int = 4, *, middle: bool = True) -> Any:
    parts = parts_of(weight, bits, middle=middle)
    stored = {
        f"{name}.weight_packed": words_of(parts.numbers, bits),
        f"{name}.weight_scale": parts.scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if not middle:
        stored[f"{name}.weight_zero_point"] = words_of(parts.zeros.T, bits).T
    return stored, parts.values()


def fp8(name: str, weight: torch.Tensor, area: tuple[int, int], scale: str) -> Any:
    rows, columns = weight.shape
    shape = -(-rows // area[0]), -(-columns // area[1])
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    each = scales.repeat_interleave(area[0], 0).repeat_interleave(area[1], 1)[:rows, :columns]
    numbers = weight.to(torch.float8_e4m3fn)
    alone = scales.flatten()[0] if scales.numel() == 1 else scales
    stored = {f"{name}.weight": numbers, f"{name}.{scale}": alone.clone()}
    stored[f"{name}.input_scale"] = torch.ones(1)
    return stored, numbers.float() * each


def int8(name: str, weight: torch.Tensor) -> Any:
    scales = (weight.abs().amax(1, keepdim=True) / 127).half()
    numbers = (weight / scales).round().clamp(-127, 127)
    stored = {f"{name}.weight": numbers.to(torch.int8), f"{name}.weight_scale": scales}
    return stored, numbers * scales.float()


COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FLOAT8 = {"quant_method": "fp8", "weight_block_size": [48, 64]}
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq, "Q4_1"),
    "gptq-8": ({"quant_method": "gptq", "bits": 8}, lambda n, w: gptq(n, w, 8), "Q8_0"),
    "gptq-2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda n, w: gptq(n, w, newer=True),
        "Q4_1",
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, awq, "Q4_1"),
    "compressed": (COMPRESSED, compressed, "Q4_1"),
    "compressed-8": (COMPRESSED, lambda n, w: compressed(n, w, 8), "Q8_0"),
    "compressed-zeros": (COMPRESSED, lambda n, w: compressed(n, w, middle=False), "Q4_1"),
    "fp8-areas": (FLOAT8, lambda n, w: fp8(n, w, (48, 64), "weight_scale_inv"), "BF16"),
    "fp8-rows": (COMPRESSED, lambda n, w: fp8(n, w, (1, 512), "weight_scale"), "BF16"),
    "fp8-whole": (FLOAT8, lambda n, w: fp8(n, w, (512, 512), "weight_scale"), "BF16"),
    "int8": (COMPRESSED, int8, "Q8_0"),
}


def write(folder: Path, layout: str, **changes: Any) -> tuple[Path, Tensors]:
    """A folder whose layers' matrices are stored in that layout, and what its tensors are worth."""
    config, store, _ = LAYOUTS[layout]
    write_llama(folder, **(SIZES | changes), quantization_config=config)
    stored: Tensors = {}
    values: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("model.layers.") and name.endswith(("proj.weight", "w1.weight")):
            more, values[name] = store(name.removesuffix(".weight"), tensor)
            stored |= more
        else:
            stored[name] = values[name] = tensor
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors")
    return folder, values


def floats(folder: Path, values: Tensors, **changes: Any) -> Path:
    """The same model, not quantized."""
    write_llama(folder, **(SIZES | changes))
    save_file({n: t.float().contiguous() for n, t in values.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_worth_what_was_stored(tmp_path: Path, layout: str) -> None:
    folder, values = write(tmp_path, layout)
    checkpoint, kind = open_checkpoint(folder), LAYOUTS[layout][2]
    assert checkpoint.names() == set(values)
    formats = set()
    for name, wanted in values.items():
        tensor = checkpoint.tensor(name)
        assert torch.equal(tensor.dense().float(), wanted.float()), name
        formats.add(tensor.format)
        if tensor.format.startswith("Q"):
            blocks = dequantize(tensor.packed().numpy(), GGMLQuantizationType[tensor.format])
            # fp16 holds a lowest value to within a 2048th of it.
            assert float((torch.from_numpy(blocks) - wanted).abs().max()) < 1e-3
    assert formats == {"F32", kind}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_is_a_part_of_the_whole(tmp_path: Path, layout: str) -> None:
    """Rows from anywhere; columns at blocks, within a group of scales or over several."""
    folder, values = write(tmp_path, layout)
    name = "model.layers.1.mlp.down_proj.weight"
    tensor, wanted = open_checkpoint(folder).tensor(name), values[name]
    for rows, columns in (((3, 17), (32, 160)), ((64, 1), (96, 32)), ((0, 128), (64, 64))):
        part = tensor.narrow(1, *columns).narrow(0, *rows)
        assert part.shape == (rows[1], columns[1])
        place = slice(rows[0], sum(rows)), slice(columns[0], sum(columns))
        assert torch.equal(part.dense(), wanted[place])
        if tensor.format.startswith("Q"):
            size = tensor.packed().shape[1] // (192 // 32)
            blocks = slice(columns[0] // 32 * size, sum(columns) // 32 * size)
            assert torch.equal(part.packed(), tensor.packed()[place[0], blocks])


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_computes_what_its_weights_say(tmp_path: Path, layout: str) -> None:
    folder, values = write(tmp_path / "quantized", layout)
    same = floats(tmp_path / "floats", values)
    found, wanted = (run(path, "torch", [60], TOKENS) for path in (folder, same))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    one, several = on_one_and(folder, "native", 2)
    check_close(one, several)


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    folder, values = write(tmp_path / "quantized", "awq", **EXPERTS)
    same = floats(tmp_path / "floats", values, **EXPERTS)
    found, wanted = (run(path, "torch", [60], TOKENS) for path in (folder, same))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def changed(folder: Path, layout: str, tensors: Tensors, **config: Any) -> str:
    """What opening one matrix says of a model with these tensors and settings in place."""
    write(folder, layout)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(raw))
    stored = load_file(folder / "model.safetensors") | tensors
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(folder).tensor("model.layers.0.self_attn.q_proj.weight").packed()
    return str(caught.value)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layout", "tensors", "config", "message"),
    [
        ("gptq", {}, {"quant_method": "aqlm"}, "quantized with aqlm; these work: gptq, awq"),
        ("gptq", {}, {"bits": 3}, "3 bits in gptq; 4 and 8 work"),
        ("awq", {}, {"version": "gemv"}, "AWQ's layout 'gemv'; 'gemm' works"),
        (
            "gptq",
            {f"{Q}.g_idx": torch.arange(128, dtype=torch.int32) % 2},
            {},
            "grouped by activation",
        ),
        ("gptq", {f"{Q}.scales": torch.ones(3, 128).half()}, {}, "3 groups for 128 inputs"),
        (
            "gptq-8",
            {f"{Q}.qzeros": torch.zeros(2, 32, dtype=torch.int32)},
            {},
            "8 bits, and others than 128 stand for zero",
        ),
        (
            "compressed",
            {f"{Q}.weight_packed": torch.zeros(128, 64, dtype=torch.uint8)},
            {"format": "nvfp4-pack-quantized"},
            "format 'nvfp4-pack-quantized', which cannot",
        ),
        ("compressed", {f"{Q}.weight_shape": torch.tensor([128, 256])}, {}, "of [128, 256] is in"),
        ("compressed", {f"{Q}.weight_shape": torch.tensor([128])}, {}, "of [128] is in words of"),
        ("compressed", {f"{Q}.weight_shape": torch.tensor([64, 128])}, {}, "neither 4 nor 8 bits"),
        ("compressed", {f"{Q}.weight_scale": torch.ones(128)}, {}, "parts of F32 [128], not"),
        (
            "compressed-zeros",
            {f"{Q}.weight_zero_point": torch.zeros(128, 2, dtype=torch.int8)},
            {},
            "parts of I8 [128, 2], not",
        ),
        ("awq", {f"{Q}.qweight": torch.zeros(128, 16)}, {}, "parts of F32 [128, 16], not"),
        ("awq", {f"{Q}.qweight": torch.zeros(5, dtype=torch.int32)}, {}, "parts of I32 [5], not"),
        ("awq", {f"{Q}.scales": torch.ones(2, 64).half()}, {}, "has scales for 64"),
        (
            "awq",
            {f"{Q}.qzeros": torch.zeros(1, 16, dtype=torch.int32)},
            {},
            "zeros for 128 in 1",
        ),
        ("fp8-areas", {}, {"weight_block_size": 128}, "weight_block_size is 128"),
        ("int8", {f"{Q}.weight_zero_point": torch.ones(128, 1)}, {}, "zero points beside 0"),
        ("fp8-areas", {f"{Q}.weight_scale_inv": torch.ones(5, 5)}, {}, "has 5 x 5 scales"),
        ("int8", {f"{Q}.weight_scale": torch.ones(1, 128)}, {}, "no one scale a row"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    tmp_path: Path, layout: str, tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    assert message in changed(tmp_path, layout, tensors, **config)


def test_a_configuration_that_is_no_object_is_named(tmp_path: Path) -> None:
    write_llama(tmp_path, quantization_config=["awq"])
    with pytest.raises(ConfigError, match="quantization_config is no object"):
        open_checkpoint(tmp_path)


def test_experts_may_have_a_bias_of_zeros_and_no_other(tmp_path: Path) -> None:
    """As some of GPTQ's writers give to every linear."""
    folder, _ = write(tmp_path, "gptq", **EXPERTS)
    before = run(folder, "torch", [60], TOKENS)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.bias"
    save_file(stored | {name: torch.zeros(128)}, folder / "model.safetensors")
    assert torch.equal(run(folder, "torch", [60], TOKENS), before)
    save_file(stored | {name: torch.ones(128)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"experts\.2\.w2\.bias' is there, but not for all of"):
        run(folder, "torch", [60], TOKENS)


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_what_is_missing_is_named(tmp_path: Path, lost: str) -> None:
    write(tmp_path, "awq")
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"{Q}.{lost}"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"no tensor '{Q}.{lost}'"):
        open_checkpoint(tmp_path).tensor(f"{Q}.weight")


def test_numbers_without_scales_are_named(tmp_path: Path) -> None:
    write(tmp_path, "int8")
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"{Q}.weight_scale"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="I8 without its scales"):
        open_checkpoint(tmp_path).tensor(f"{Q}.weight")
