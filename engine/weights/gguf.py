"""GGUF checkpoints: tensors under Hugging Face names, configuration in Hugging Face keys."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ConfigError
from engine.weights import gguf_gemma, gguf_latent, gguf_recurrent
from engine.weights.checkpoint import MAX_EXPERTS
from engine.weights.files import check_part, gguf_parts, map_file
from engine.weights.fused import FusedTensors
from engine.weights.gguf_header import TensorEntry, read_header
from kernels.backend import HostTensor

FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "token_embd_norm": "model.norm",  # LFM2's
    "output": "lm_head",
    **gguf_gemma.TOP_NAMES,
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}
# Tensors that Hugging Face does not call a weight or a bias.
BARE = ("attn_sinks", "exp_probs_b")
# Tensors of all experts, `[experts, out, in]`; older files have a tensor for each.
EXPERT_NAMES = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
    "ffn_gate_up_exps": "gate_up_proj",
}
OLDER_EXPERTS = re.compile(r"ffn_(gate|up|down)\.(\d+)")
# Of some families, by their `model_type`; Phi's projections lie in one tensor each.
OWN_NAMES = {
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gemma3_text": gguf_gemma.NORMS,
    gguf_gemma.MODEL_TYPE: gguf_gemma.NAMES,
    "glm4": {
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
        "ffn_up": "mlp.gate_up_proj",
    },
    **dict.fromkeys(("olmo2", "olmo3"), gguf_gemma.NORMS),
    "seed_oss": {"post_attention_norm": "post_attention_layernorm"},
    "glm4_moe": {"post_attention_norm": "post_attention_layernorm"},
    "gpt_oss": {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
    "qwen2_moe": gguf_recurrent.SHARED_NAMES,
    **dict.fromkeys(gguf_recurrent.MODEL_TYPES.values(), gguf_recurrent.NAMES),
    **dict.fromkeys(gguf_recurrent.CONV_TYPES.values(), gguf_recurrent.CONV_NAMES),
    **dict.fromkeys(gguf_latent.MODEL_TYPES.values(), gguf_latent.NAMES),
}
# Tensors of layers whose names Hugging Face ends otherwise, likewise.
WHOLE_NAMES = {
    gguf_gemma.MODEL_TYPE: gguf_gemma.WHOLE_NAMES,
    **dict.fromkeys(gguf_recurrent.MODEL_TYPES.values(), gguf_recurrent.WHOLE_NAMES),
}
# GGUF key under the architecture's prefix -> Hugging Face configuration key.
CONFIG_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
    "interleave_moe_layer_step": "moe_layer_interval",
    "nextn_predict_layers": "num_nextn_predict_layers",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
SCALING_KEYS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
    "yarn_log_multiplier": "mscale_all_dim",
}
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
GEMMA_27B_LAYERS = 62
EXPERT_DIMENSIONS = 3
# Keys that say nothing when they are 0.
UNSET_AT_ZERO = ("routed_scaling_factor", "moe_layer_interval")
# llama.cpp's number for experts' probabilities that are each score's own.
SIGMOID = 2
# No name in a file holds it.
EACH_EXPERT = "\0"
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "mistral3": "ministral3",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "glm4": "glm4",
    "olmo2": "olmo2",
    "ernie4_5": "ernie4_5",
    "seed_oss": "seed_oss",
    "gpt-oss": "gpt_oss",
    "glm4moe": "glm4_moe",
    "ernie4_5-moe": "ernie4_5_moe",
    **gguf_recurrent.MODEL_TYPES,
    **gguf_recurrent.CONV_TYPES,
    gguf_gemma.ARCHITECTURE: gguf_gemma.MODEL_TYPE,
    gguf_latent.ARCHITECTURE: gguf_latent.MODEL_TYPES[False],
}
# Whose heads may rotate in part.
ROTATED_IN_PART = ("phi3", "glm4", "glm4moe", *gguf_recurrent.MODEL_TYPES)
# Whose blocks behind the last layer guess tokens further ahead.
GUESSING_AHEAD = ("glm4moe", gguf_latent.ARCHITECTURE, *gguf_recurrent.MODEL_TYPES)
# Whose query and key rows are stored for interleaved rotation.
INTERLEAVED = ("llama", "mistral3", "smollm3", "granite")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in the mapped file, or a part of it. `raw` is uint8 `[rows, bytes per row]` as
    stored; `row_order` lists which stored row each logical row is."""

    name: str
    shape: tuple[int, ...]
    entry: TensorEntry
    raw: npt.NDArray[np.uint8]
    row_order: npt.NDArray[np.int64] | None = None

    @property
    def format(self) -> str:
        return self.entry.type.name

    @property
    def block(self) -> int:
        return GGML_QUANT_SIZES[self.entry.type][0]

    def narrow(self, dimension: int, start: int, length: int) -> GGUFTensor:
        shape = list(self.shape)
        shape[dimension] = length
        if dimension:
            assert start % self.block == length % self.block == 0, "a block cannot be cut"
            values, size = GGML_QUANT_SIZES[self.entry.type]
            columns = slice(start // values * size, (start + length) // values * size)
            return replace(self, shape=tuple(shape), raw=self.raw[:, columns])
        rows = slice(start, start + length)
        if self.row_order is not None:
            return replace(self, shape=tuple(shape), row_order=self.row_order[rows])
        return replace(self, shape=tuple(shape), raw=self.raw[rows])

    def dense(self) -> torch.Tensor:
        if self.entry.type in FLOATS:
            data = torch.from_numpy(self._rows()).view(FLOATS[self.entry.type])
            return data.reshape(self.shape)
        try:
            return torch.from_numpy(dequantize(self._rows(), self.entry.type)).reshape(self.shape)
        except NotImplementedError:
            raise ConfigError(
                f"tensor {self.entry.name!r} is stored as {self.format}, which cannot be read"
            ) from None

    def packed(self) -> torch.Tensor:
        if self.entry.type in FLOATS:
            raise ValueError(f"{self.name} is stored as {self.format}, not in blocks")
        return torch.from_numpy(self._rows())

    def _rows(self) -> npt.NDArray[np.uint8]:
        """The stored bytes, `[rows, bytes per row]`, rows in logical order, writable."""
        rows = self.raw.copy() if self.row_order is None else self.raw[self.row_order]
        return rows if len(self.shape) > 1 else rows.reshape(1, -1)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor lies: in which of the mapped files, and where in it."""

    file: mmap.mmap
    entry: TensorEntry


class GGUFCheckpoint:
    """A GGUF file or the parts of a split one, memory-mapped; no tensor is read before it is asked
    for. Without `texts` the tokenizer cannot be made from it."""

    norms_include_one = True

    def __init__(self, path: Path, *, texts: bool = True) -> None:
        parts = gguf_parts(path)
        self.path = parts[0]
        places: dict[str, Place] = {}
        for number, part in enumerate(parts):
            file = map_file(part)
            header = read_header(memoryview(file), part.name, texts=texts and number == 0)
            check_part(header.metadata, part, number, len(parts))
            if number == 0:
                self.metadata = header.metadata
            places |= {name: Place(file, entry) for name, entry in header.tensors.items()}
        self.config = self._config({name: place.entry for name, place in places.items()})
        self._tensors = dict(self._renamed(places))
        self._rope_factors = self._tensors.pop("rope_freqs.weight", None)
        self._read_longrope()
        self._fused = FusedTensors(self._tensors, self.config)

    def names(self) -> set[str]:
        return self._fused.names(self._tensors)

    def tensor(self, name: str) -> HostTensor:
        return self._fused.tensor(name, self._stored) or self._stored(name)

    def _stored(self, name: str) -> GGUFTensor:
        place = self._tensors.get(name)
        if place is None:
            raise ConfigError(f"{self.path.name} has no tensor {name!r}")
        return self._open(name, place)

    def rope_factors(self) -> list[float] | None:
        if self._rope_factors is None:
            return None
        return [float(x) for x in self._open("rope_freqs.weight", self._rope_factors).dense()]

    def _read_longrope(self) -> None:
        """Phi's divisors for contexts beyond that of training, into the configuration."""
        places = [self._tensors.pop(name, None) for name in (LONG_FACTORS, SHORT_FACTORS)]
        if places[0] is None or places[1] is None:
            return
        architecture = self.metadata["general.architecture"]
        self.config["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": self._open(LONG_FACTORS, places[0]).dense().tolist(),
            "short_factor": self._open(SHORT_FACTORS, places[1]).dense().tolist(),
            "attention_factor": self.metadata.get(f"{architecture}.rope.scaling.attn_factor"),
        }

    def _open(self, name: str, place: Place) -> GGUFTensor:
        entry = place.entry
        raw = np.frombuffer(place.file, np.uint8, entry.size, entry.start)
        # A vector has one row a value, so that it can be narrowed, too; blocks are never cut.
        whole = len(entry.shape) == 1 and entry.type not in FLOATS
        raw = raw.reshape(1 if whole else entry.shape[0], -1)
        return GGUFTensor(name, entry.shape, entry, raw, self._row_order(name))

    def _row_order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Some files store query and key rows for interleaved rotation; undo it (rows only)."""
        if self.metadata["general.architecture"] not in INTERLEAVED:
            return None
        if ".q_proj." in name:
            heads = self.config.get("num_attention_heads")
        elif ".k_proj." in name:
            heads = self.config.get("num_key_value_heads", self.config.get("num_attention_heads"))
        else:
            return None
        rows = np.arange(self._tensors[name].entry.shape[0])
        if not isinstance(heads, int) or heads < 1 or len(rows) % (2 * heads):
            raise ConfigError(
                f"{self.path.name}: tensor {name!r} has {len(rows)} rows, not for {heads!r} heads"
            )
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _renamed(self, places: dict[str, Place]) -> Iterator[tuple[str, Place]]:
        """The tensors under Hugging Face names, those of all experts cut into each one's."""
        for name, place in places.items():
            renamed, entry = self._rename(name), place.entry
            if any(f".{part}." in name for part in gguf_latent.OF_HEADS):
                rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1]
                yield renamed, replace(place, entry=replace(entry, shape=(rows, columns)))
                continue
            if EACH_EXPERT not in renamed:
                yield renamed, place
                continue
            bias = name.endswith(".bias")
            if len(entry.shape) != EXPERT_DIMENSIONS - bias:
                raise ConfigError(
                    f"{self.path.name}: tensor {name!r} has shape {list(entry.shape)}, "
                    f"not experts x rows{'' if bias else ' x columns'}"
                )
            count, *shape = entry.shape
            if count > MAX_EXPERTS:
                raise ConfigError(f"{self.path.name}: tensor {name!r} has {count} experts")
            for n in range(count):
                size = entry.size // count
                part = TensorEntry(name, tuple(shape), entry.type, entry.start + n * size, size)
                yield renamed.replace(EACH_EXPERT, str(n)), Place(place.file, part)

    def _rename(self, name: str) -> str:
        """Its Hugging Face name; EACH_EXPERT in it stands for an expert's number."""
        base, _, kind = name.rpartition(".")
        if base in TOP_NAMES:
            return f"{TOP_NAMES[base]}.{kind}"
        if base.startswith("blk."):
            model_type = self.config["model_type"]
            _, layer, last = (*name.split(".", 2), "")[:3]
            if last in (whole := WHOLE_NAMES.get(model_type, {})):
                return f"model.layers.{layer}.{whole[last]}"
            part = last.rpartition(".")[0]
            names = LAYER_NAMES | OWN_NAMES.get(model_type, {})
            if part in names:
                own = f"model.layers.{layer}.{names[part]}"
                return own if part in BARE else f"{own}.{kind}"
            if part in EXPERT_NAMES:
                return f"model.layers.{layer}.mlp.experts.{EACH_EXPERT}.{EXPERT_NAMES[part]}.{kind}"
            if older := OLDER_EXPERTS.fullmatch(part):
                return f"model.layers.{layer}.mlp.experts.{older[2]}.{older[1]}_proj.{kind}"
        return name

    def _config(self, tensors: dict[str, TensorEntry]) -> dict[str, Any]:
        architecture = self.metadata.get("general.architecture")
        if architecture not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ConfigError(
                f"{self.path.name}: key 'general.architecture' is {architecture!r}; "
                f"these can be served: {known}"
            )
        config: dict[str, Any] = {"model_type": MODEL_TYPES[architecture]}
        for key, name in CONFIG_KEYS.items():
            value = self.metadata.get(f"{architecture}.{key}")
            if value is not None and (value or name not in UNSET_AT_ZERO):
                config[name] = value
        if architecture == "llama" and config.get("num_local_experts"):
            config["model_type"] = "mixtral"
        if architecture == "olmo2" and config.get("sliding_window"):
            config["model_type"] = "olmo3"
            pattern = self.metadata.get("olmo2.attention.sliding_window_pattern")
            if isinstance(pattern, list):
                kinds = ("full_attention", "sliding_attention")
                config["layer_types"] = [kinds[bool(slides)] for slides in pattern]
        if architecture == "qwen3moe":
            # Every model of the kind does, and the file does not say.
            config["norm_topk_prob"] = True
        if architecture in gguf_recurrent.MODEL_TYPES:
            config |= gguf_recurrent.read_keys(self.metadata, self.path.name)
        if architecture in gguf_recurrent.CONV_TYPES:
            config |= gguf_recurrent.read_conv_keys(self.metadata, self.path.name)
        if architecture == gguf_gemma.ARCHITECTURE:
            config |= gguf_gemma.read_keys(self.metadata, tensors, self.path.name)
            table = tensors.get("per_layer_token_embd.weight")
            config["vocab_size_per_layer_input"] = table.shape[0] if table is not None else 1
        if architecture in GUESSING_AHEAD:
            ahead, blocks = config.get("num_nextn_predict_layers"), config.get("num_hidden_layers")
            if isinstance(ahead, int) and isinstance(blocks, int):
                config["num_hidden_layers"] = blocks - ahead
        if architecture == "glm4moe":
            config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
            kind = self.metadata.get("glm4moe.expert_gating_func", SIGMOID)
            if kind not in (0, SIGMOID):
                raise ConfigError(f"{self.path.name}: expert_gating_func is {kind}, not {SIGMOID}")
        if "token_embd.weight" not in tensors:
            raise ConfigError(f"{self.path.name} has no tensor 'token_embd.weight'")
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
        if architecture == gguf_latent.ARCHITECTURE:
            config |= gguf_latent.read_keys(self.metadata, config["vocab_size"], self.path.name)
        config["tie_word_embeddings"] = "output.weight" not in tensors
        scaling = self.metadata.get(f"{architecture}.rope.scaling.type", "none")
        if scaling != "none":
            config["rope_scaling"] = self._scaling(architecture, scaling)
        width = self.metadata.get(f"{architecture}.rope.dimension_count")
        if architecture in ROTATED_IN_PART and width is not None:
            hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
            if not (isinstance(hidden, int) and isinstance(heads, int) and 0 < heads <= hidden):
                raise ConfigError(f"{self.path.name}: {heads!r} heads of {hidden!r} are none")
            dim = config.get("head_dim", hidden // heads)
            if not (isinstance(width, int) and isinstance(dim, int) and dim > 0):
                raise ConfigError(f"{self.path.name}: rope.dimension_count is {width!r} of {dim!r}")
            config["partial_rotary_factor"] = width / dim
        if architecture == "gemma3" and config.get("num_hidden_layers") == GEMMA_27B_LAYERS:
            # The one size whose attention is not scaled by its head width; the file does not say.
            config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
            config[name] = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return config

    def _scaling(self, architecture: str, kind: str) -> dict[str, Any]:
        prefix = f"{architecture}.rope.scaling."
        scaling: dict[str, Any] = {"rope_type": kind, "factor": 1.0}
        for key, name in SCALING_KEYS.items():
            if prefix + key in self.metadata:
                scaling[name] = self.metadata[prefix + key]
        if architecture == "gpt-oss":
            # The file does not say where its frequencies change: between whole ones, too.
            scaling["truncate"] = False
        if scaling.get("mscale_all_dim"):
            scaling["mscale"] = 1.0
            if architecture == gguf_latent.ARCHITECTURE:
                # A tenth of it is what these hold.
                scaling["mscale_all_dim"] = scaling["mscale"] = 10 * scaling["mscale_all_dim"]
        temperature = self.metadata.get(f"{architecture}.attention.temperature_scale")
        if temperature is not None:
            scaling["llama_4_scaling_beta"] = temperature
        return scaling
