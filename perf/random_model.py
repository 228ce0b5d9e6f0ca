"""GGUF files with random weights of real models' sizes, but for the number of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kernels.ops import DeltaHeads, Heads

VOCAB, CONTEXT = 32768, 1024
# Of each layer, beside that before attention; most have one.
NORMS = {
    "qwen3moe": ("ffn_norm",),
    "gemma4": ("post_attention_norm", "ffn_norm", "post_ffw_norm"),
}


@dataclass(frozen=True)
class Sizes:
    """A model's, and the ggml types of its feed-forward matrices and of all else. Without experts
    `wide` is that of a dense layer; with `delta` three layers of four are delta nets, with `inputs`
    there is a vector so wide for each token and layer (Gemma 4)."""

    architecture: str
    hidden: int
    wide: int
    experts: int
    used: int
    heads: Heads
    kind: GGMLQuantizationType
    dense: GGMLQuantizationType
    delta: DeltaHeads | None = None
    inputs: int = 0

    def keeps_state(self, layer: int) -> bool:
        """Whether a layer is a delta net."""
        return self.delta is not None and (layer + 1) % 4 != 0

    def slides(self, layer: int) -> bool:
        """Whether a layer of Gemma 4 sees the last tokens alone; others have wider heads."""
        return (layer + 1) % 5 != 0

    def heads_of(self, layer: int) -> Heads:
        """A layer's heads."""
        wide = self.inputs > 0 and not self.slides(layer)
        return replace(self.heads, dim=2 * self.heads.dim) if wide else self.heads


Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
SIZES = {
    "qwen3-30b": Sizes("qwen3moe", 2048, 768, 128, 8, Heads(32, 4, 128), Q4_0, Q4_0),
    "gpt-oss-20b": Sizes(
        "gpt-oss", 2880, 2880, 32, 4, Heads(64, 8, 64), GGMLQuantizationType.MXFP4, Q8_0
    ),
    "qwen3.5-0.8b": Sizes(
        "qwen35", 1024, 3584, 0, 0, Heads(8, 2, 256), Q4_0, Q4_0, DeltaHeads(16, 16, 128, 128, 4)
    ),
    "gemma4-e2b": Sizes("gemma4", 1536, 6144, 0, 0, Heads(8, 1, 256), Q4_0, Q4_0, inputs=256),
}


class RandomFile:
    """A writer of tensors with random numbers."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.writer = gguf.GGUFWriter(path, sizes.architecture)
        self._sizes = sizes
        self._rng = np.random.default_rng(0)

    def matrix(self, name: str, *shape: int, kind: GGMLQuantizationType | None = None) -> None:
        """Blocks with random numbers under one scale, of about a hundredth."""
        kind = self._sizes.dense if kind is None else kind
        block, size = GGML_QUANT_SIZES[kind]
        blocks = self._rng.integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
        if kind is GGMLQuantizationType.MXFP4:
            blocks[:, 0] = 121
        else:
            scale = np.float16(0.01 if kind is Q4_0 else 0.001)
            blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        rows: npt.NDArray[np.uint8] = blocks.reshape(*shape[:-1], shape[-1] // block * size)
        self.writer.add_tensor(f"{name}.weight", rows, raw_dtype=kind)

    def floats(self, name: str, *shape: int, mean: float = 0.0, spread: float = 0.05) -> None:
        """Normally distributed numbers."""
        values: npt.NDArray[np.float32] = self._rng.normal(mean, spread, shape).astype(np.float32)
        self.writer.add_tensor(name, values)

    def close(self) -> None:
        """Write it."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_header(writer: gguf.GGUFWriter, sizes: Sizes, layers: int) -> None:
    """All but the tensors; there is no tokenizer."""
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(3 * sizes.hidden if sizes.experts else sizes.wide)
    writer.add_head_count(sizes.heads.query)
    writer.add_head_count_kv(sizes.heads.kv)
    writer.add_key_length(sizes.heads.dim)
    writer.add_value_length(sizes.heads.dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    if sizes.experts:
        writer.add_expert_count(sizes.experts)
        writer.add_expert_used_count(sizes.used)
        writer.add_expert_feed_forward_length(sizes.wide)
    if sizes.architecture == "gpt-oss":
        writer.add_sliding_window(128)
    if (delta := sizes.delta) is not None:
        writer.add_rope_dimension_count(sizes.heads.dim // 4)
        writer.add_rope_dimension_sections([11, 11, 10, 0])
        writer.add_ssm_conv_kernel(delta.taps)
        writer.add_ssm_state_size(delta.key_dim)
        writer.add_ssm_group_count(delta.key)
        writer.add_ssm_time_step_rank(delta.value)
        writer.add_ssm_inner_size(delta.value * delta.value_dim)
        writer.add_uint32(f"{sizes.architecture}.full_attention_interval", 4)
    if sizes.inputs:
        write_gemma_header(writer, sizes, layers)


def write_gemma_header(writer: gguf.GGUFWriter, sizes: Sizes, layers: int) -> None:
    """What differs between layers: four of seven read the keys of others, and are wider."""
    shared = layers * 4 // 7
    widths = [sizes.wide * (1 + (layer >= layers - shared)) for layer in range(layers)]
    writer.add_key_value("gemma4.feed_forward_length", widths, gguf.GGUFValueType.ARRAY)
    writer.add_sliding_window(512)
    writer.add_sliding_window_pattern([sizes.slides(layer) for layer in range(layers)])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(sizes.inputs)
    writer.add_final_logit_softcapping(30.0)
    for add in (writer.add_key_length, writer.add_value_length):
        add(2 * sizes.heads.dim)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa):
        add(sizes.heads.dim)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_rope_dimension_count(2 * sizes.heads.dim)
    writer.add_rope_dimension_count_swa(sizes.heads.dim)


def write_model(path: Path, sizes: Sizes, layers: int) -> None:
    """A GGUF file with random weights."""
    file = RandomFile(path, sizes)
    write_header(file.writer, sizes, layers)
    hidden = sizes.hidden
    file.matrix("token_embd", VOCAB, hidden)
    if sizes.inputs:
        write_inputs(file, sizes, layers)
    else:
        file.matrix("output", VOCAB, hidden)
    file.floats("output_norm.weight", hidden, mean=1.0)
    for layer in range(layers):
        block = f"blk.{layer}."
        if sizes.keeps_state(layer):
            write_delta(file, block, sizes)
        else:
            write_attention(file, block, sizes, sizes.heads_of(layer))
        if sizes.experts:
            write_experts(file, block, sizes)
        else:
            shared = sizes.inputs > 0 and layer >= layers - layers * 4 // 7
            wide = sizes.wide * (2 if shared else 1)
            for name in ("gate", "up"):
                file.matrix(f"{block}ffn_{name}", wide, hidden, kind=sizes.kind)
            file.matrix(f"{block}ffn_down", hidden, wide, kind=sizes.kind)
        for name in ("attn_norm", *NORMS.get(sizes.architecture, ("post_attention_norm",))):
            file.floats(f"{block}{name}.weight", hidden, mean=1.0)
    file.close()


def write_inputs(file: RandomFile, sizes: Sizes, layers: int) -> None:
    """The table of vectors for the layers, and what each makes of its own."""
    hidden, width = sizes.hidden, sizes.inputs
    file.matrix("per_layer_token_embd", VOCAB, layers * width)
    file.matrix("per_layer_model_proj", layers * width, hidden)
    file.floats("per_layer_proj_norm.weight", width, mean=1.0)
    turning = sizes.heads.dim // 4
    factors = np.array([1.0] * turning + [1e30] * (sizes.heads.dim - turning), np.float32)
    file.writer.add_tensor("rope_freqs.weight", factors)
    for layer in range(layers):
        file.matrix(f"blk.{layer}.inp_gate", width, hidden)
        file.matrix(f"blk.{layer}.proj", hidden, width)
        file.floats(f"blk.{layer}.post_norm.weight", hidden, mean=1.0)
        file.floats(f"blk.{layer}.layer_output_scale.weight", 1, mean=1.0)


def write_attention(file: RandomFile, block: str, sizes: Sizes, heads: Heads) -> None:
    """Projections of one layer, with what the family has besides."""
    hidden = sizes.hidden
    gates = 2 if sizes.delta is not None else 1
    projections = {
        "attn_q": (gates * heads.query * heads.dim, hidden),
        "attn_k": (heads.kv * heads.dim, hidden),
        "attn_v": (heads.kv * heads.dim, hidden),
        "attn_output": (hidden, heads.query * heads.dim),
    }
    for name, shape in projections.items():
        file.matrix(block + name, *shape)
    if sizes.architecture == "gpt-oss":
        for name, shape in projections.items():
            file.floats(f"{block}{name}.bias", shape[0])
        file.floats(f"{block}attn_sinks.weight", heads.query)
        return
    for name in ("attn_q_norm", "attn_k_norm"):
        file.floats(f"{block}{name}.weight", heads.dim, mean=1.0)


def write_experts(file: RandomFile, block: str, sizes: Sizes) -> None:
    """The experts of one layer, and what chooses among them."""
    count, wide, hidden = sizes.experts, sizes.wide, sizes.hidden
    experts = {
        "ffn_gate_exps": (count, wide, hidden),
        "ffn_up_exps": (count, wide, hidden),
        "ffn_down_exps": (count, hidden, wide),
    }
    for name, stack in experts.items():
        file.matrix(block + name, *stack, kind=sizes.kind)
    file.floats(f"{block}ffn_gate_inp.weight", count, hidden)
    if sizes.architecture == "gpt-oss":
        file.floats(f"{block}ffn_gate_inp.bias", count)
        for name, stack in experts.items():
            file.floats(f"{block}{name}.bias", *stack[:2])


def write_delta(file: RandomFile, block: str, sizes: Sizes) -> None:
    """The delta net of one layer."""
    heads, hidden = sizes.delta, sizes.hidden
    assert heads is not None
    values = heads.value * heads.value_dim
    file.matrix(f"{block}attn_qkv", heads.width, hidden)
    file.matrix(f"{block}attn_gate", values, hidden)
    file.matrix(f"{block}ssm_out", hidden, values)
    for name in ("ssm_alpha", "ssm_beta"):
        file.floats(f"{block}{name}.weight", heads.value, hidden)
    file.floats(f"{block}ssm_conv1d.weight", heads.width, heads.taps, spread=0.3)
    file.floats(f"{block}ssm_a", heads.value, mean=-1.0)
    file.floats(f"{block}ssm_dt.bias", heads.value)
    file.floats(f"{block}ssm_norm.weight", heads.value_dim, mean=1.0)
