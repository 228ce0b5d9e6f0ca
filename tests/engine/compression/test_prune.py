"""Narrower feed-forward layers: what goes, what the rest takes over, and whole models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.compression.fit import Inputs
from engine.compression.prune import neurons, prune, refitted
from engine.compression.quantize import quantize
from engine.errors import ConfigError
from engine.models import load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from tests.engine.compression.test_quantize import WINDOWS, distance, logits, write
from tests.engine.models.test_ranks import tiny
from tests.tiny import EXPERTS


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neurons_that_others_can_speak_for_go_first() -> None:
    inputs, weight = random(1000, 12), random(8, 12, seed=1)
    inputs[:, 5] = inputs[:, 2] + inputs[:, 3]
    inputs[:, 7] = 0.0
    weight[:, 9] = 0.0
    kept = neurons(weight, Inputs(inputs.T @ inputs, 1000), 9).tolist()
    assert not {7, 9} & set(kept)
    assert len({2, 3, 5} & set(kept)) == 2
    assert kept == sorted(kept)


def test_what_stays_makes_up_for_what_goes() -> None:
    inputs = random(2000, 20, seed=2) @ random(20, 64, seed=3) + 0.1 * random(2000, 64, seed=4)
    weight, products = random(16, 64), Inputs(inputs.T @ inputs, 2000)
    chosen = neurons(weight, products, 40)
    wanted = inputs @ weight.T
    cut = distance(inputs[:, chosen] @ weight[:, chosen].T, wanted)
    fitted = distance(inputs[:, chosen] @ refitted(weight, products, chosen).T, wanted)
    assert fitted < 0.2 * cut
    every = torch.arange(64)
    assert distance(refitted(weight, products, every), weight) < 0.01


def narrowed(folder: Path, keep: float = 0.7, **changes: Any) -> tuple[Path, Path]:
    source, target = write(folder / "source", **changes), folder / "target"
    windows = [torch.randint(3, 250, (300,)).tolist() for _ in range(2)]
    width = prune(source, target, keep, windows, lambda *_: None)
    assert json.loads((target / "config.json").read_text())["intermediate_size"] == width
    return source, target


def test_a_narrowed_model_is_a_model_like_others(tmp_path: Path) -> None:
    source, target = narrowed(tmp_path)
    found = open_checkpoint(target)
    before = open_checkpoint(source)
    assert found.names() == before.names()
    assert found.tensor("model.layers.0.mlp.gate_proj.weight").shape == (64, 64)
    assert found.tensor("model.layers.1.mlp.down_proj.weight").shape == (64, 64)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(found.tensor(name).dense(), before.tensor(name).dense())
    assert logits(target).isfinite().all()
    smaller = tmp_path / "smaller"
    quantize(target, smaller, WINDOWS, lambda *_: None)
    assert logits(smaller).isfinite().all()


def test_neurons_that_say_nothing_leave_without_a_trace(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    tensors = {name: t.dense() for name, t in tensors_of(source)}
    for name, tensor in tensors.items():
        if name.endswith("mlp.down_proj.weight"):
            tensor[:, 10:42] = 0.0
    save(tensors, source)
    target = tmp_path / "target"
    prune(source, target, 2 / 3, WINDOWS, lambda *_: None)
    assert distance(logits(target), logits(source)) < 0.05


def tensors_of(folder: Path) -> list[tuple[str, Any]]:
    checkpoint = open_checkpoint(folder)
    return [(name, checkpoint.tensor(name)) for name in checkpoint.names()]


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("keep", "family", "message"),
    [
        (1.5, {}, "1.5 is no share of the neurons"),
        (0.99, {}, "0.99 of 96 neurons are all, in steps of 32"),
        (0.5, EXPERTS, "cannot be narrowed"),
    ],
)
def test_what_cannot_be_narrowed_says_why(
    tmp_path: Path, keep: float, family: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "source", **family)
    with pytest.raises(ConfigError, match=message):
        prune(source, tmp_path / "target", keep, WINDOWS, lambda *_: None)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.weight", "'lm_head.weight' holds values that are not finite"),
        (
            "model.layers.1.mlp.up_proj.weight",
            "what 'model.layers.1.mlp.down_proj.weight' is given is not finite",
        ),
    ],
)
def test_what_is_no_number_is_named(tmp_path: Path, name: str, message: str) -> None:
    source = write(tmp_path / "source")
    tensors = {name: t.dense().clone() for name, t in tensors_of(source)}
    tensors[name][1, 2] = torch.nan
    save(tensors, source)
    with pytest.raises(ConfigError, match=message):
        prune(source, tmp_path / "target", 0.7, WINDOWS, lambda *_: None)
    assert not (tmp_path / "target").exists()


def test_the_command_writes_a_model(tmp_path: Path) -> None:
    source, text = write(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("What is said here is what it is fitted to. " * 40)
    target = tmp_path / "target"
    command = [sys.executable, "-m", "server.cli", "prune", str(source), str(target)]
    result = subprocess.run(
        [*command, "--keep", "0.7", "--text", str(text)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "layers are 64 wide" in result.stdout
    command[-2:] = ["nowhere", str(tmp_path / "other")]
    result = subprocess.run(
        [*command, "--keep", "5", "--text", str(text)], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "Must be < 1" in result.stdout + result.stderr


def test_layers_of_two_widths_keep_the_same_share(tmp_path: Path) -> None:
    """Gemma 4's last layers, which make no keys, are twice as wide."""
    source, target = tiny(tmp_path / "source", "gemma4"), tmp_path / "target"
    assert prune(source, target, 0.5, WINDOWS, lambda *_: None) == 32
    found = open_checkpoint(target)
    widths = [found.tensor(f"model.layers.{n}.mlp.down_proj.weight").shape[1] for n in range(6)]
    assert widths == [32, 32, 32, 32, 64, 64]
    load_model(
        found, select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)[0]
    )
