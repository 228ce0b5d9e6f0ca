"""GGUF: names, row order, every readable type, packed blocks, and files that lie."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.models import load_model
from engine.text.gguf_tokenizer import tokenizer_from_gguf
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf import GGUFCheckpoint, GGUFTensor
from engine.weights.gguf_header import TensorEntry, read_header
from kernels.backend import select_backend
from tests.engine.models.test_parity import run
from tests.tiny import LLAMA, llama_tensors, write_llama

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}


def gguf_name(name: str) -> str:
    base, _, kind = name.rpartition(".")
    if base in GGUF_NAMES:
        return f"{GGUF_NAMES[base]}.{kind}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The row order that llama files use: the two halves of each head, interleaved."""
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(weight.shape)


def writer_of(
    path: Path, architecture: str, config: dict[str, Any], **options: Any
) -> gguf.GGUFWriter:
    """A writer that has been told a model's sizes."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    return writer


def rows_as_stored(
    name: str, array: np.ndarray[Any, Any], architecture: str, config: dict[str, Any]
) -> np.ndarray[Any, Any]:
    """Llama files have query and key rows in their own order."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name and architecture == "llama":
            array = interleave(array, config[heads])
    return array


def write_out(writer: gguf.GGUFWriter) -> None:
    """All that the writer has been told, to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path,
    *,
    kind: Type = Type.F32,
    architecture: str = "llama",
    extra: dict[str, torch.Tensor] | None = None,
    tensors_a_part: int = 0,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """A complete tiny file, or several; matrices are stored as `kind`. Returns its true weights."""
    tensors = llama_tensors(LLAMA) | (extra or {})
    writer = writer_of(path, architecture, LLAMA, split_max_tensors=tensors_a_part)
    writer.add_rope_freq_base(LLAMA["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_array("test.flags", [True, False])
    writer.add_array("test.numbers", [1, 2, 3])
    for key, value in changes.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        array = rows_as_stored(name, tensor.numpy(), architecture, LLAMA)
        if array.ndim == 2 and array.shape[1] % 32 == 0 and kind != Type.F32:
            data = quantize(array, kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    write_out(writer)
    return tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def test_tensors_come_under_hugging_face_names_in_hugging_face_order(plain: Path) -> None:
    checkpoint = open_checkpoint(plain)
    expected = llama_tensors(LLAMA)
    assert checkpoint.names() == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert (found.shape, found.format) == (tuple(tensor.shape), "F32")
        assert torch.equal(found.dense(), tensor), name


def test_the_configuration_comes_in_hugging_face_keys(plain: Path) -> None:
    config = open_checkpoint(plain).config
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert config[key] == LLAMA[key]
    assert config["tie_word_embeddings"] is False
    assert config["rms_norm_eps"] == pytest.approx(LLAMA["rms_norm_eps"])


def test_metadata_arrays_keep_their_kinds(plain: Path) -> None:
    metadata = GGUFCheckpoint(plain).metadata
    assert metadata["test.flags"] == [True, False]
    assert metadata["test.numbers"] == [1, 2, 3]
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b"]


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.BF16])
def test_quantized_matrices_are_close_and_their_blocks_reachable(
    tmp_path: Path, kind: Type
) -> None:
    path = tmp_path / "q.gguf"
    expected = write_gguf(path, kind=kind)
    checkpoint = open_checkpoint(path)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        tensor = checkpoint.tensor(name)
        assert tensor.format == kind.name
        error = (tensor.dense().float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 0.15
        if kind is Type.BF16:
            with pytest.raises(ValueError, match="not in blocks"):
                tensor.packed()
            continue
        packed = tensor.packed()
        blocks, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        assert packed.dtype == torch.uint8
        assert packed.shape == (tensor.shape[0], tensor.shape[1] // blocks * block_bytes)
        again = gguf.dequantize(packed.numpy(), kind)
        assert np.array_equal(again, tensor.dense().numpy())


def per_layer(**parts: int) -> dict[str, torch.Tensor]:
    """Random vectors of the given sizes for every layer; `__` stands for a dot."""
    generator = torch.Generator().manual_seed(9)
    return {
        f"model.layers.{layer}.self_attn.{part.replace('__', '.')}": torch.randn(
            size, generator=generator
        )
        for layer in range(LLAMA["num_hidden_layers"])
        for part, size in parts.items()
    }


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {}),
        ("llama", per_layer(q_proj__bias=32, k_proj__bias=16, v_proj__bias=16)),
        ("qwen2", per_layer(q_proj__bias=32, k_proj__bias=16, v_proj__bias=16)),
        ("qwen3", per_layer(q_norm__weight=8, k_norm__weight=8)),
    ],
    ids=["llama", "llama-biased", "qwen2", "qwen3"],
)
def test_a_gguf_model_gives_the_logits_of_the_same_model_in_safetensors(
    tmp_path: Path, architecture: str, extra: dict[str, torch.Tensor]
) -> None:
    file = tmp_path / "model.gguf"
    tensors = write_gguf(file, architecture=architecture, extra=extra)
    folder = write_llama(tmp_path / "folder", model_type=architecture)
    save_file(tensors, folder / "model.safetensors")
    tokens = list(range(3, 40))
    results = [run(path, "torch", [len(tokens)], tokens) for path in (file, folder)]
    assert torch.allclose(results[0], results[1], atol=1e-4)
    assert float(results[0].std()) > 0.1


READABLE = sorted(gguf.quants._type_traits, key=lambda kind: kind.name)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantizes_can_be_read(kind: Type) -> None:
    """Random blocks, read through our tensor and by the package itself."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = block * (256 // block)
    raw = np.random.default_rng(0).integers(0, 120, (3, columns // block * size), np.uint8)
    entry = TensorEntry("t", (3, columns), kind, 0, raw.nbytes)
    tensor = GGUFTensor("t", (3, columns), entry, raw)
    expected = gguf.dequantize(raw, kind)
    assert np.array_equal(tensor.dense().float().numpy(), expected, equal_nan=True)
    if kind not in (Type.F16, Type.BF16, Type.F32):
        assert np.array_equal(tensor.packed().numpy(), raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split__count": 2}, "says that it is number 0, from 0 on, of 2 parts"),
        ({"general__alignment": 0}, "'general.alignment' is 0"),
    ],
)
def test_files_that_cannot_be_served_say_why(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    path = tmp_path / "bad.gguf"
    write_gguf(path, **changes)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(path)


def header(version: int = 3, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, 0) + tensors


def entry(
    name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    packed = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    return packed + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), "does not start with 'GGUF'"),
        (header(version=1), "version 1"),
        (header()[:10], "truncated or corrupt at the tensor count"),
        (header(count=10**15), "truncated or corrupt at tensors"),
        (header(tensors=entry(dims=(1,) * 5), count=1), "5 dimensions"),
        (header(tensors=entry(kind=999), count=1), "unknown ggml type 999"),
        (header(tensors=entry(dims=(31,), kind=2), count=1), "not whole Q4_0 blocks"),
        (header(tensors=entry(dims=(2**40,)), count=1), "is truncated: tensor 't'"),
        (header(tensors=entry(dims=(32, 0, 2**40)), count=1), "tensor 't' has a dimension of 0"),
        (header(tensors=entry(name=b"\xff"), count=1), "not valid UTF-8"),
    ],
)
def test_headers_that_lie_are_caught(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_header(memoryview(data), "m.gguf")


def metadata(kind: int, payload: bytes) -> bytes:
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + payload
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (metadata(99, bytes(8)), "unknown value type 99"),
        (metadata(9, struct.pack("<IQ", 99, 0)), "array of the unknown type 99"),
        (metadata(9, struct.pack("<IQ", 0, 10**12)), "truncated or corrupt at key 'k'"),
        (metadata(8, struct.pack("<Q", 10**12)), "truncated or corrupt at key 'k'"),
    ],
)
def test_metadata_that_lies_is_caught(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_header(memoryview(data), "m.gguf")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_anywhere_in_the_header_never_ends_in_a_traceback(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Through everything that reads metadata: the header, the tokenizer, the model."""
    raw = bytearray(plain.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.sampled_from([len(raw), 2000, 900, 60]))]
    damaged = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged.write_bytes(bytes(raw))
    with contextlib.suppress(ConfigError):
        checkpoint = GGUFCheckpoint(damaged)
        backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
        with contextlib.suppress(ConfigError):
            tokenizer_from_gguf(checkpoint.metadata, damaged.name)
        load_model(checkpoint, backend)


def test_a_file_without_a_key_value_head_count_has_one_for_each_query_head(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mha.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((32, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((30, 32), np.float32))
    writer.add_tensor("blk.0.weight", np.zeros((1, 32), np.float32))
    write_out(writer)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensor("model.layers.0.self_attn.k_proj.weight").dense().shape == (32, 32)
    with pytest.raises(ConfigError, match="30 rows, not for 4 heads"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")
    assert "blk.0.weight" in checkpoint.names()


def test_an_unreadable_type_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "i8.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.int8))
    write_out(writer)
    with pytest.raises(ConfigError, match=r"'token_embd\.weight' is stored as I8"):
        open_checkpoint(path).tensor("model.embed_tokens.weight").dense()


def test_other_architectures_and_missing_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    for architecture, message in (("bert", "'bert'"), ("llama", r"'token_embd\.weight'")):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tensor("x", np.zeros((1, 32), np.float32))
        write_out(writer)
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(path)
    with pytest.raises(ConfigError, match="cannot read"):
        open_checkpoint(tmp_path / "missing.gguf")


def test_rope_factors_and_scaling_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rope.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 4], np.float32))
    write_out(writer)
    checkpoint = open_checkpoint(path)
    assert checkpoint.rope_factors() == [1, 2, 3, 4]
    assert checkpoint.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert "rope_freqs.weight" not in checkpoint.names()


def test_an_unknown_tensor_keeps_its_name_and_a_missing_one_is_named(plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tensor 'model\.nope'"):
        open_checkpoint(plain).tensor("model.nope")
