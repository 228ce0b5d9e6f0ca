"""Experts that lie in one tensor for all of them: as gpt-oss's checkpoints have them, with MXFP4,
and as Qwen's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from kernels.cpu.native_weights import FLOAT4
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import tiny
from tests.kernels.native import needs_native
from tests.ranks import logits_of, program_of

EXPERTS = "model.layers.0.mlp.experts"
TOKENS = list(range(3, 63))
# What the numbers of four bits stand for: a sign, two bits of exponent, one of mantissa.
NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def pairs_of(blocks: torch.Tensor) -> torch.Tensor:
    """ggml's order of sixteen bytes to that of neighbours: uint8 `[..., 16]`."""
    numbers = torch.cat((blocks & 15, blocks >> 4), -1)
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def in_mxfp4(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A model with its experts in MXFP4, and the same as floats."""
    float_folder = tiny(folder / "float", "gpt_oss", hidden_size=64, **changes)
    tensors = load_file(float_folder / "model.safetensors")
    narrow: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            narrow[name] = tensor
            continue
        rows = tensor.transpose(1, 2).contiguous()
        count, outputs, inputs = rows.shape
        raw = gguf.quantize(rows.view(-1, inputs).numpy(), Type.MXFP4)
        blocks = torch.from_numpy(raw).view(count, outputs, inputs // 32, 17)
        narrow[f"{name}_scales"] = blocks[..., 0].contiguous()
        pairs = pairs_of(blocks[..., 1:])
        narrow[f"{name}_blocks"] = pairs.contiguous()
        each = torch.stack((NUMBERS[(pairs & 15).long()], NUMBERS[(pairs >> 4).long()]), -1)
        each = torch.ldexp(each.flatten(-2), blocks[..., :1].float() - 127)
        tensors[name] = each.view(count, outputs, inputs).transpose(1, 2).contiguous()
    save_file(tensors, float_folder / "model.safetensors", {"format": "pt"})
    quantized = folder / "mxfp4"
    quantized.mkdir()
    save_file(narrow, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((float_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, float_folder


def test_numbers_of_four_bits_give_the_logits_of_what_they_stand_for(tmp_path: Path) -> None:
    results = [run(path, "reference", [60], TOKENS) for path in in_mxfp4(tmp_path)]
    assert torch.equal(results[0], results[1])
    assert float(results[0].std()) > 0.03


@needs_native
def test_they_stay_in_their_bits_on_a_cpu(tmp_path: Path) -> None:
    programs = [
        program_of(path, "native", None, dtype=dtype)
        for path, dtype in zip(in_mxfp4(tmp_path), ("auto", "float32"), strict=True)
    ]
    results = [logits_of(program, TOKENS, [60]) for program, _ in programs]
    assert (results[0] - results[1]).norm() / results[1].norm() < 0.05
    experts = next(i for i in programs[0][1].instructions if i.op == "experts")
    for weight in experts.arguments[2:4]:
        assert weight.packed.format == FLOAT4


def test_a_part_of_an_expert_is_that_part_of_it(tmp_path: Path) -> None:
    for path in in_mxfp4(tmp_path):
        checkpoint = open_checkpoint(path)
        for name in ("3.gate_proj", "4.up_proj", "0.down_proj"):
            whole = checkpoint.tensor(f"{EXPERTS}.{name}.weight")
            assert whole.shape == (64, 64)
            part = whole.narrow(0, 5, 20).narrow(1, 32, 32).narrow(0, 1, 9)
            assert torch.equal(part.dense(), whole.dense()[6:15, 32:])
            bias = checkpoint.tensor(f"{EXPERTS}.{name}.bias")
            assert torch.equal(bias.narrow(0, 7, 3).dense(), bias.dense()[7:10])


def changed(folder: Path, change: Any) -> Checkpoint:
    """The MXFP4 folder once more, its tensors and configuration changed."""
    path, _ = in_mxfp4(folder)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(path)


def without_scales(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    del tensors[f"{EXPERTS}.gate_up_proj_scales"]


def with_short_blocks(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    name = f"{EXPERTS}.gate_up_proj_blocks"
    tensors[name] = tensors[name][..., :8].contiguous()


def with_a_number(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    tensors[f"{EXPERTS}.gate_up_proj_blocks"] = torch.tensor(1, dtype=torch.uint8)


def with_more_experts(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["num_local_experts"] = 4


def with_few_experts(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    for kind in ("blocks", "scales"):
        name = f"{EXPERTS}.gate_up_proj_{kind}"
        tensors[name] = tensors[name][:2].contiguous()


@pytest.mark.parametrize(
    "change",
    [without_scales, with_short_blocks, with_few_experts, with_more_experts, with_a_number],
)
def test_stacks_that_are_none_are_named(tmp_path: Path, change: Any) -> None:
    with pytest.raises(ConfigError, match=r"gate_up_proj_blocks' is U8 .* no stacked experts"):
        changed(tmp_path, change).tensor(f"{EXPERTS}.1.gate_proj.weight")


def test_other_families_stacks_are_not_taken_for_such(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path, lambda _, config: config.update(model_type="llama"))
    assert f"{EXPERTS}.gate_up_proj_blocks" in checkpoint.names()


@pytest.mark.parametrize("count", [None, "many", 0, 1 << 20])
def test_a_number_of_experts_that_is_none_is_named(tmp_path: Path, count: Any) -> None:
    with pytest.raises(ConfigError, match="num_local_experts = "):
        changed(tmp_path, lambda _, config: config.update(num_local_experts=count))


def stack(folder: Path, *, turned: bool) -> None:
    """Rewrite a folder's experts as one tensor for gates and ups and one for downs."""
    tensors = load_file(folder / "model.safetensors")
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        block, _, rest = name.partition(".experts.")
        number, projection, _ = rest.split(".")
        found.setdefault(f"{block}.experts", {}).setdefault(int(number), {})[projection] = (
            tensors.pop(name)
        )
    for block, experts in found.items():
        each = [experts[number] for number in range(len(experts))]
        gate_up = torch.stack([torch.cat((e["gate_proj"], e["up_proj"])) for e in each])
        for kind, whole in (
            ("gate_up", gate_up),
            ("down", torch.stack([e["down_proj"] for e in each])),
        ):
            tensors[f"{block}.{kind}_proj"] = (
                whole.transpose(1, 2) if turned else whole
            ).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("family", ["qwen3-experts", "qwen3_5_moe"])
def test_experts_of_qwen_may_lie_in_one_tensor(
    tmp_path: Path, family: str, *, turned: bool
) -> None:
    folder = tiny(tmp_path, family)
    apart = run(folder, "torch", [60], TOKENS)
    stack(folder, turned=turned)
    assert torch.equal(run(folder, "torch", [60], TOKENS), apart)
    weight = open_checkpoint(folder).tensor("model.layers.0.mlp.experts.2.up_proj.weight")
    assert torch.equal(weight.narrow(0, 3, 9).narrow(1, 5, 7).dense(), weight.dense()[3:12, 5:12])


def test_what_is_no_stack_of_qwens_is_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen3-experts")
    stack(folder, turned=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    with pytest.raises(ConfigError, match=r"gate_up_proj' is F32 .* no stacked experts"):
        open_checkpoint(folder).tensor("model.layers.0.mlp.experts.1.up_proj.weight")
