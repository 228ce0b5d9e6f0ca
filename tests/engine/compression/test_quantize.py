"""Whole models in four bits, on every backend and on several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from engine.compression import calibration, folder
from engine.compression.calibration import calibrated
from engine.compression.fit import Inputs, gptq
from engine.compression.folder import open_floats, windows_of
from engine.compression.prune import prune
from engine.compression.quantize import quantize
from engine.errors import ConfigError
from engine.weights.checkpoint import open_checkpoint
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import check_close, on_one_and, tiny
from tests.engine.weights.test_gguf import write_gguf
from tests.kernels.native import needs_native
from tests.tiny import EXPERTS, write_llama, write_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
WINDOWS = [
    torch.randint(3, 250, (100,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in range(3)
]
TOKENS = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(1)).tolist()


def write(folder: Path, **changes: Any) -> Path:
    return write_llama(folder, **(SIZES | changes))


def made(folder: Path, windows: list[list[int]] | None = None, **changes: Any) -> tuple[Path, Path]:
    """A float model, and the same quantized."""
    source = write(folder / "source", **changes)
    target = folder / "target"
    quantize(source, target, windows or [], lambda *_: None)
    return source, target


def logits(path: Path, backend: str = "torch") -> torch.Tensor:
    return run(path, backend, [len(TOKENS)], TOKENS)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", [{}, EXPERTS], ids=["dense", "experts"])
def test_linears_have_four_bits_tables_eight_and_the_rest_all(
    tmp_path: Path, family: dict[str, Any]
) -> None:
    source, target = made(tmp_path, **family)
    before, after = open_checkpoint(source), open_checkpoint(target)
    assert before.names() == after.names()
    kinds: dict[str, list[float]] = {}
    for name in before.names():
        tensor, wanted = after.tensor(name), before.tensor(name).dense()
        kinds.setdefault(tensor.format, []).append(distance(tensor.dense(), wanted))
    assert max(kinds.pop("F32")) == 0.0
    assert max(kinds.pop("Q8_0")) < 0.01
    assert max(kinds.pop("Q4_1")) < 0.1
    assert not kinds
    formats = {name: after.tensor(name).format for name in after.names()}
    assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"] == "Q8_0"
    routers = [name for name in formats if name.endswith((".gate.weight", ".router.weight"))]
    assert all(formats[name] == "F32" for name in routers)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / file).read_bytes() == (source / file).read_bytes()


def test_what_chooses_experts_is_not_rounded(tmp_path: Path) -> None:
    """Nor are biases, though some lie in a matrix."""
    for family, more in (
        ("gpt_oss", {"num_local_experts": 32}),
        ("ernie4_5_moe", {"moe_num_experts": 32}),
    ):
        source = tiny(tmp_path / family, family, hidden_size=64, **more)
        write_tokenizer(source)
        quantize(source, target := tmp_path / f"{family}-4", [], lambda *_: None)
        before, after = open_checkpoint(source), open_checkpoint(target)
        kinds = {name: after.tensor(name).format for name in after.names()}
        exact = [n for n in kinds if "router" in n or ".gate." in n or "correction" in n]
        assert len(exact) >= 4
        for name in exact:
            assert torch.equal(after.tensor(name).dense(), before.tensor(name).dense())
        assert kinds["model.layers.1.mlp.experts.3.down_proj.weight"] == "Q4_1"
        assert (logits(target) - logits(source)).norm() / logits(source).norm() < 0.6


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "qwen3_5_moe"])
def test_layers_with_states_are_fitted_but_for_what_says_how_much_counts(
    tmp_path: Path, family: str
) -> None:
    wide = {"shared_expert_intermediate_size": 32, "mlp_only_layers": []}
    source = tiny(
        tmp_path / "source", family, hidden_size=64, **(wide if family != "qwen3_5" else {})
    )
    write_tokenizer(source)
    quantize(source, target := tmp_path / "target", WINDOWS, lambda *_: None)
    before, after = open_checkpoint(source), open_checkpoint(target)
    assert after.names() == before.names()
    kinds = {name: after.tensor(name).format for name in after.names()}
    gates = ("in_proj_a.", "in_proj_b.", "in_proj_ba.", "shared_expert_gate.", "conv1d.", "A_log")
    exact = [name for name in kinds if any(gate in name for gate in gates)]
    assert len(exact) >= 9
    for name in exact:
        assert torch.equal(after.tensor(name).dense(), before.tensor(name).dense())
    attention = "model.layers.3.self_attn.q_proj.weight"
    assert {kinds[attention], kinds["model.layers.0.linear_attn.out_proj.weight"]} == {"Q4_1"}
    error = after.tensor(attention).dense() - before.tensor(attention).dense()
    assert error.norm() / before.tensor(attention).dense().norm() < 0.2


def test_shared_experts_in_one_are_not_fitted(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "glm4_moe", hidden_size=64)
    with pytest.raises(ConfigError, match="2 shared experts in one cannot be fitted"):
        quantize(source, tmp_path / "target", WINDOWS, lambda *_: None)


def test_it_computes_what_its_weights_say(tmp_path: Path) -> None:
    source, target = made(tmp_path)
    checkpoint = open_checkpoint(target)
    dense = {name: checkpoint.tensor(name).dense() for name in checkpoint.names()}
    found = logits(target)
    save_file(dense, source / "model.safetensors")
    assert torch.equal(logits(source), found)


@pytest.mark.parametrize(("family", "places"), [({}, 8), (EXPERTS, 6)], ids=["dense", "experts"])
def test_calibration_leaves_less_error_behind_every_linear(
    tmp_path: Path, family: dict[str, Any], places: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    windows = [torch.randint(3, 250, (200,), generator=generator).tolist() for _ in range(4)]
    source, simple = made(tmp_path / "plain", **family)
    fitted = tmp_path / "fitted"
    seen: list[tuple[str, int, int]] = []
    quantize(source, fitted, windows, lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "calibrate"] == [
        ("calibrate", n, 4 * places) for n in range(1, 4 * places + 1)
    ]
    assert seen[-1][:2] == ("quantize", seen[-1][2])
    float_model, *others = (open_checkpoint(path) for path in (source, simple, fitted))
    for name, inputs in inputs_of(source, windows):
        weight = float_model.tensor(name).dense()
        missed = [other.tensor(name).dense() - weight for other in others]
        left = [_squares(each, inputs.products) for each in missed]
        assert left[1] < 0.9 * left[0], name


def inputs_of(path: Path, windows: list[list[int]]) -> Iterator[tuple[str, Inputs]]:
    """What every projection of a model is given."""

    def wanted(name: str, width: int) -> bool:
        return "proj" in name or "experts" in name

    for linear in calibrated(open_checkpoint(path), windows, wanted, _ignore):
        for name in linear.names:
            yield name, linear.inputs


def _ignore(*_: object) -> None: ...


@pytest.mark.parametrize(("family", "count"), [({}, 14), (EXPERTS, 32)], ids=["dense", "experts"])
def test_a_linear_is_fitted_to_what_the_float_model_gives_it(
    tmp_path: Path, family: dict[str, Any], count: int
) -> None:
    source, target = made(tmp_path, WINDOWS, **family)
    checkpoint, result = open_checkpoint(source), open_checkpoint(target)
    found = dict(inputs_of(source, WINDOWS))
    assert len(found) == count
    for name, inputs in found.items():
        assert inputs.rows == 300 or "experts" in name
        fitted = gptq(checkpoint.tensor(name).dense(), inputs).values()
        assert torch.equal(fitted, result.tensor(name).dense()), name


@pytest.mark.parametrize("windows", [WINDOWS[:1], WINDOWS], ids=["few", "many"])
def test_an_expert_is_fitted_to_the_rows_that_go_through_it(
    tmp_path: Path, windows: list[list[int]]
) -> None:
    """Two of the four, for each row; and to others where those are fewer than it has inputs."""
    rows: dict[str, list[int]] = {}
    for name, inputs in inputs_of(write(tmp_path, **EXPERTS), windows):
        if "experts" in name:
            rows.setdefault(name.rsplit(".", 2)[1], []).append(inputs.rows)
    assert rows["w1"] == rows["w2"] == rows["w3"]
    assert min(rows["w1"]) >= 96
    if windows == WINDOWS:
        assert all(600 <= sum(layer) < 680 for layer in (rows["w1"][:4], rows["w1"][4:]))
    else:
        assert max(rows["w1"]) <= 100


def _squares(missed: torch.Tensor, products: torch.Tensor) -> float:
    """What an error of a weight comes to behind it."""
    return float(((missed @ products) * missed).sum())


def test_a_model_in_several_files_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = made(tmp_path, WINDOWS)
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    pieces = tmp_path / "pieces"
    quantize(source, pieces, WINDOWS, lambda *_: None)
    assert len(list(pieces.glob("*.safetensors"))) > 2
    assert torch.equal(logits(pieces), logits(target))


@needs_native
def test_the_native_kernels_take_its_bits_and_ranks_their_parts(tmp_path: Path) -> None:
    _, target = made(tmp_path)
    one, several = on_one_and(target, "native", 2)
    check_close(one, several)
    # Activations are rounded here; the weights are the same.
    floats, parts = on_one_and(target, "torch", 2)
    check_close(floats, parts)
    assert distance(one, floats) < 0.2


def test_stacked_projections_are_fitted_and_pruned_apart(tmp_path: Path) -> None:
    """Phi's, whose heads rotate in part, too."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 260}
    source = tiny(tmp_path / "source", "phi3-longrope", **sizes)
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    quantize(source, plain, [], lambda *_: None)
    quantize(source, fitted, WINDOWS, lambda *_: None)
    names = open_checkpoint(fitted).names()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert names == open_checkpoint(source).names()
    before = logits(source)
    assert 0 < distance(logits(fitted), before) < distance(logits(plain), before) < 0.5
    narrow = tmp_path / "narrow"
    assert prune(source, narrow, 0.7, WINDOWS, lambda *_: None) == 64
    assert distance(logits(narrow), before) < 0.5


def test_a_text_becomes_windows_spread_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_floats(write(tmp_path))
    monkeypatch.setattr(folder, "WINDOW", 4)
    text = "".join(chr(ord("a") + n) for n in range(18))
    found = windows_of(source, text, 8)
    assert [bytes(window).decode() for window in found] == ["abcd", "mnop"]
    assert windows_of(source, "ab", 8) == [list(b"ab")]
    assert windows_of(source, "abcdef", 8) == [list(b"abcd"), list(b"ef")]
    assert windows_of(source, text, 3) == [list(b"abc")]


def test_what_cannot_be_quantized_says_why(tmp_path: Path) -> None:
    source, target = made(tmp_path)
    other = tmp_path / "other"
    with pytest.raises(ConfigError, match="is quantized already; give the float model"):
        quantize(target, other, [], lambda *_: None)
    with pytest.raises(ConfigError, match="is there already; name a folder that is not"):
        quantize(source, target, [], lambda *_: None)
    file = tmp_path / "model.gguf"
    write_gguf(file)
    with pytest.raises(ConfigError, match="is a GGUF file, which has its bits; give the float"):
        quantize(file, other, [], lambda *_: None)
    floats = open_floats(source)
    with pytest.raises(ConfigError, match="gives 60 tokens, but what 96 inputs of a layer have"):
        quantize(source, other, [TOKENS], lambda *_: None)
    (source / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="model_type is 'bert', an encoder"):
        quantize(source, other, [], lambda *_: None)
    with pytest.raises(ConfigError, match="the text to calibrate with is empty"):
        windows_of(floats, "", 8)
    assert not other.exists()


def test_what_was_interrupted_leaves_nothing(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source"), tmp_path / "target"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, [], interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_memory_cannot_hold_is_refused_before_it_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source")
    monkeypatch.setattr(calibration, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"takes about 0 GB of memory, and 0 GB are free"):
        quantize(source, tmp_path / "target", WINDOWS, lambda *_: None)
    quantize(source, tmp_path / "target", [], lambda *_: None)


def test_a_bfloat16_model_is_seen_as_it_is(tmp_path: Path) -> None:
    """Its weights are kept as they are, and multiplied in float32."""
    source, rounded = write(tmp_path / "source"), write(tmp_path / "rounded")
    checkpoint = open_checkpoint(source)
    tensors = {name: checkpoint.tensor(name).dense().bfloat16() for name in checkpoint.names()}
    save_file(tensors, source / "model.safetensors")
    save_file({n: t.float() for n, t in tensors.items()}, rounded / "model.safetensors")
    narrow, wide = (dict(inputs_of(path, WINDOWS)) for path in (source, rounded))
    last = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(narrow[last].products, wide[last].products)


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"up_proj\.weight' holds values that are not finite"):
        quantize(source, tmp_path / "target", [], lambda *_: None)
    assert not (tmp_path / "target").exists()


def test_what_every_prompt_begins_with_begins_every_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tokenizer ends prompts, too."""
    source = write(tmp_path / "source")
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", backend.token_to_id("<eos>"))]
    )
    backend.save(str(source / "tokenizer.json"))
    monkeypatch.setattr(folder, "WINDOW", 2)
    end = backend.token_to_id("<eos>")
    found = windows_of(open_floats(source), "abcd", 4)
    assert found == [[end, *b"ab"], [end, *b"cd"]]


def test_blocks_that_are_none_are_named(tmp_path: Path) -> None:
    _, target = made(tmp_path)
    file, name = target / "model-00000.safetensors", "lm_head.weight.q8_0"
    tensors = load_file(file)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"'lm_head\.weight\.q8_0' is U8 \[260, 67\], not rows"):
        open_checkpoint(target).tensor("lm_head.weight")


def test_the_command_writes_a_model(tmp_path: Path) -> None:
    source, text = write(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("What is said here is what it is fitted to. " * 40)
    target = tmp_path / "target"
    command = [sys.executable, "-m", "server.cli", "quantize", str(source), str(target)]
    result = subprocess.run([*command, "--text", str(text)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{target}: 0 MB of weights, calibrated" in result.stdout
    assert json.loads((target / "config.json").read_text())["quantization_config"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "is there already" in again.stderr


@pytest.mark.parametrize("family", ["gemma4", "gemma4-experts"])
def test_gemma_4_keeps_its_names_and_eight_bits_of_its_tables(tmp_path: Path, family: str) -> None:
    source = tiny(tmp_path / "source", family, hidden_size=64)
    write_tokenizer(source)
    quantize(source, target := tmp_path / "target", WINDOWS, lambda *_: None)
    before, after = open_checkpoint(source), open_checkpoint(target)
    assert after.names() == before.names()
    kinds = {name: after.tensor(name).format for name in after.names()}
    assert {kind for name, kind in kinds.items() if "embed_tokens" in name} == {"Q8_0"}
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == "Q4_1"
    if family == "gemma4-experts":
        assert kinds["model.layers.0.mlp.experts.1.gate_proj.weight"] == "Q4_1"
        for part in ("weight", "scale", "per_expert_scale"):
            name = f"model.layers.2.mlp.gate.{part}"
            assert torch.equal(after.tensor(name).dense(), before.tensor(name).dense())
    else:
        assert kinds["model.layers.5.per_layer_projection.weight"] == "Q4_1"
    assert logits(target).isfinite().all()
