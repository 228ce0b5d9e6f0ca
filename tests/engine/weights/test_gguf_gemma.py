"""GGUF files of Gemma 4, as llama.cpp's converter writes them: the logits are those of the folder
that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.text.gguf_tokenizer import tokenizer_from_gguf
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf import GGUFCheckpoint
from engine.weights.gguf_gemma import NAMES, TOP_NAMES
from tests.engine.models.test_parity import run
from tests.engine.models.test_ranks import tiny
from tests.engine.weights.test_gguf import GGUF_NAMES, write_out, writer_of
from tests.engine.weights.test_gguf_families import TOKENS

OWN = {
    **GGUF_NAMES,
    **{ours: theirs for theirs, ours in (TOP_NAMES | NAMES).items()},
    "router.proj": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
ENDS = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}
# A vocabulary as Gemma's is: pieces of text, bytes, and marks.
MARKS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", '<|"|>']
MARKS += ["<|tool_response>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
PIECES = ["t", "h", "e", "▁", "q", "u", "\n", "th", "the", "▁q", "▁qu", "\n\n"]


def stored(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        base = part.removesuffix(".weight")
        return f"blk.{layer}.{ENDS[part] if part in ENDS else OWN[base] + '.weight'}"
    return f"{OWN[name.removesuffix('.weight')]}.weight"


def write(folder: Path, path: Path, **changes: Any) -> None:
    """The folder as a file."""
    config = json.loads((folder / "config.json").read_text()) | changes
    full = [kind == "full_attention" for kind in config["layer_types"]]
    own = config["per_layer_config"]["1"]
    shared = config["num_kv_shared_layers"]
    wide = own["head_dim"]
    kv = [own.get("num_key_value_heads", config["num_key_value_heads"]) if f else 2 for f in full]
    writer = writer_of(path, "gemma4", config | {"num_key_value_heads": kv})
    if config["use_double_wide_mlp"]:
        narrow, layers = config["intermediate_size"], len(full)
        widths = [narrow * (1 + (n >= layers - shared)) for n in range(layers)]
        writer.add_key_value("gemma4.feed_forward_length", widths, gguf.GGUFValueType.ARRAY)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([not f for f in full])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_key_length(wide)
    writer.add_key_length_swa(config["head_dim"])
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    turning = wide // 8
    factors = torch.tensor([1.0] * turning + [1e30] * (wide // 2 - turning))
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    if config["enable_moe_block"]:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name != "lm_head.weight":
            writer.add_tensor(stored(name), tensor.numpy())
    write_out(writer)


@pytest.mark.parametrize("family", ["gemma4", "gemma4-large", "gemma4-experts"])
def test_logits_equal_the_folders(family: str, tmp_path: Path) -> None:
    folder, path = tiny(tmp_path / "folder", family), tmp_path / "model.gguf"
    write(folder, path)
    expected = run(folder, "torch", [60], TOKENS)
    assert torch.equal(run(path, "torch", [60], TOKENS), expected)


def test_a_file_without_a_pattern_of_layers_is_refused(tmp_path: Path) -> None:
    folder, path = tiny(tmp_path / "folder", "gemma4-large"), tmp_path / "model.gguf"
    config = json.loads((folder / "config.json").read_text())
    writer = writer_of(path, "gemma4", config)
    write_out(writer)
    with pytest.raises(ConfigError, match="sliding_window_pattern"):
        open_checkpoint(path)


def test_heads_for_too_few_layers_are_refused(tmp_path: Path) -> None:
    folder, path = tiny(tmp_path / "folder", "gemma4-large"), tmp_path / "model.gguf"
    config = json.loads((folder / "config.json").read_text())
    writer = writer_of(path, "gemma4", config | {"num_key_value_heads": [2, 1]})
    writer.add_sliding_window_pattern([True, False] * 3)
    write_out(writer)
    with pytest.raises(ConfigError, match=r"head_count_kv is \[2, 1\], not a count for each of 6"):
        open_checkpoint(path)


def test_text_is_cut_by_the_files_own_merges(tmp_path: Path) -> None:
    """Marks are tokens, spaces are written as U+2581, and what no piece holds is bytes."""
    tokens = [*MARKS, *BYTES, *PIECES]
    metadata = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 6 + [4] * 3 + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.merges": ["t h", "th e", "▁ q", "▁q u", "\n \n"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = tokenizer_from_gguf(metadata, "model.gguf")

    def cut(text: str) -> list[str]:
        return [tokens[i] for i in tokenizer.encode(text)]

    assert cut("the qu") == ["<bos>", "the", "▁qu"]
    assert cut("<|channel>the\n\nqü") == [
        "<bos>", "<|channel>", "the", "\n\n", "q", "<0xC3>", "<0xBC>",
    ]  # fmt: skip
    ids = tokenizer.encode('<|turn>the <|"|>ü', add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == '<|turn>the <|"|>ü'
    ends = ("<eos>", "<turn|>", "<|tool_response>")
    assert tokenizer.eos_token_ids == {tokens.index(end) for end in ends}


def test_merges_of_pieces_that_do_not_exist_are_refused() -> None:
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [*BYTES, *PIECES],
        "tokenizer.ggml.merges": ["t x"],
    }
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.merges"):
        tokenizer_from_gguf(metadata, "model.gguf")


def test_a_checkpoint_says_what_its_layers_are(tmp_path: Path) -> None:
    folder, path = tiny(tmp_path / "folder", "gemma4"), tmp_path / "model.gguf"
    write(folder, path)
    config = GGUFCheckpoint(path, texts=False).config
    assert config["layer_types"][:2] == ["sliding_attention", "full_attention"]
    assert (config["num_kv_shared_layers"], config["use_double_wide_mlp"]) == (2, True)
    assert (config["head_dim"], config["global_head_dim"]) == (16, 32)
    assert config["attention_k_eq_v"] is False
