"""Every architecture against Hugging Face `transformers`, on tiny random models in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.models import MODELS, cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from kernels.batch import Batch
from kernels.cpu.torch_ops import TorchCpuOps
from kernels.reference import LayerCache, ReferenceOps
from kernels.tape import Recorder
from kernels.torch_backend import host_states

COMMON: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + n / 10 for n in range(6)],
    "long_factor": [1.0 + n for n in range(6)],
    "original_max_position_embeddings": 32,
}
DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "head_dim": 32,
}
GATED_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 7,
    "global_head_dim": 32,
    "final_logit_softcapping": 5.0,
}
# As the models for phones are, and as those for servers.
GEMMA4_SMALL = {
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 120,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
GEMMA4_LARGE = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", GATED_EXPERTS | {"mlp_only_layers": [2]}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-experts": (
        "Qwen3MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen3-yarn-weighed": (
        "Qwen3Config",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "ministral3": (
        "Ministral3Config",
        {
            "rope_parameters": YARN
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        },
    ),
    "smollm3": ("SmolLM3Config", {}),
    "smollm3-listed": ("SmolLM3Config", {"no_rope_layers": [1, 0, 0, 1]}),
    "phi3": ("Phi3Config", {"hidden_size": 64, "sliding_window": 9}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "hidden_size": 64,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "ernie4_5": ("Ernie4_5Config", {"use_bias": True}),
    "helium": ("HeliumConfig", {"hidden_size": 64}),
    "ministral": (
        "MinistralConfig",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": 7,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "dots1": (
        "Dots1Config",
        {
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 32,
            "moe_layer_interval": 2,
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
    "qwen3_5-equal-heads": (
        "Qwen3_5TextConfig",
        DELTA | {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 3},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", DELTA | GATED_EXPERTS),
    "qwen3_next": ("Qwen3NextConfig", DELTA | GATED_EXPERTS | {"mlp_only_layers": [1]}),
    "lfm2": (
        "Lfm2Config",
        {"hidden_size": 64, "layer_types": ["conv", "full_attention", "conv", "conv"]},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            "hidden_size": 64,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "conv_L_cache": 4,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        LATENT
        | {
            "attention_bias": True,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v2-groups": (
        "DeepseekV2Config",
        LATENT
        | {
            "n_routed_experts": 8,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek_v3-groups": (
        "DeepseekV3Config",
        LATENT | {"first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    ),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", LATENT | {"rope_interleave": False}),
    "seed_oss": ("SeedOssConfig", {"attention_out_bias": True}),
    "bitnet": ("BitNetConfig", {"hidden_size": 64, "hidden_act": "relu2"}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 7}),
    "olmo3-yarn": (
        "Olmo3Config",
        {
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 7, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    ),
    "gemma4": ("Gemma4TextConfig", GEMMA4 | GEMMA4_SMALL),
    "gemma4-large": ("Gemma4TextConfig", GEMMA4 | GEMMA4_LARGE),
    "gemma4-experts": (
        "Gemma4TextConfig",
        GEMMA4
        | GEMMA4_LARGE
        | {
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """All that a checkpoint holds; biases and norms start as constants otherwise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
            if name.endswith("layer_scalar"):
                buffer.copy_(torch.rand_like(buffer) + 0.3)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    """A saved tiny model, and the same model in `transformers`."""
    name, changes = FAMILIES[request.param]
    config = getattr(transformers, name)(**(COMMON | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def run(
    folder: Path, backend_name: str, chunks: list[int], tokens: list[int], unseen: int = 0
) -> torch.Tensor:
    """Logits of every position, the prompt computed in chunks of the given sizes; nobody asks for
    those of the first `unseen` chunks."""
    backend, _ = select_backend(backend_name, dtype="float32", cache_dtype="auto", threads=2)
    model = load_model(open_checkpoint(folder), backend)
    size, pages = 4, -(-len(tokens) // 4)
    backend.allocate_cache(cache_layout(model, size, "float32"), 64, states=1)
    recorder = Recorder()
    program = backend.compile(recorder.finish(model.forward(recorder)), 512)
    table = np.random.default_rng(0).permutation(64)[:pages].astype(np.int32)[None]
    logits, start = [], 0
    for number, count in enumerate(chunks):
        positions = np.arange(start, start + count)
        batch = Batch(
            token_ids=np.array(tokens[start : start + count], np.int64),
            positions=positions,
            kv_slots=table[0, positions // size].astype(np.int64) * size + positions % size,
            query_starts=np.array([0, count], np.int32),
            context_lengths=np.array([start + count], np.int32),
            table_rows=np.zeros(1, np.int32),
            page_table=table,
            sample_rows=np.arange(0 if number < unseen else count, dtype=np.int64),
        )
        program.forward(batch)
        logits.append(program.logits().clone())
        start += count
    return torch.cat(logits)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_logits_equal_transformers(pair: tuple[Path, torch.nn.Module], backend: str) -> None:
    folder, model = pair
    tokens = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    for chunks in ([60], [17, 1, 1, 30, 11]):
        logits = run(folder, backend, chunks, tokens.tolist())
        error = (logits - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"chunks {chunks}"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_step_of_which_nothing_is_asked_still_fills_the_cache(
    pair: tuple[Path, torch.nn.Module], backend: str
) -> None:
    """As the pieces of a long prompt before its last do."""
    tokens = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = run(pair[0], backend, [40], tokens)
    later = run(pair[0], backend, [23, 17], tokens, unseen=1)
    torch.testing.assert_close(later, whole[23:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ReferenceOps, TorchCpuOps])
def test_a_recorded_tape_equals_eager_at_every_row_count(
    pair: tuple[Path, torch.nn.Module], kind: type[ReferenceOps]
) -> None:
    """Recording sees no rows at all, so one tape serves every count."""
    backend, _ = select_backend("torch", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(pair[0]), backend)
    recorder = Recorder()
    tape = recorder.finish(model.forward(recorder))

    def ops() -> ReferenceOps:
        shapes = [(64, heads.kv, heads.dim) for heads in model.heads]
        caches = [LayerCache(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
        return kind(caches, 4, None, host_states(cache_layout(model, 4, "float32"), 1))

    recorded, eager = ops(), ops()
    generator = np.random.default_rng(0)
    for rows in range(1, 65):
        batch = Batch(
            token_ids=generator.integers(0, 120, rows),
            positions=np.arange(rows),
            kv_slots=np.arange(rows),
            query_starts=np.array([0, rows], np.int32),
            context_lengths=np.array([rows], np.int32),
            table_rows=np.zeros(1, np.int32),
            page_table=np.arange(16, dtype=np.int32)[None],
            sample_rows=np.arange(rows, dtype=np.int64),
        )
        recorded.begin(batch)
        eager.begin(batch)
        assert torch.equal(tape.replay(recorded), model.forward(eager)), rows


def test_every_registered_family_is_covered() -> None:
    covered = {
        getattr(transformers, name)(**(COMMON | changes)).model_type
        for name, changes in FAMILIES.values()
    }
    assert covered == set(MODELS)


def test_the_saved_configuration_is_what_transformers_writes(
    pair: tuple[Path, torch.nn.Module],
) -> None:
    """Guards the parity tests: the folder must be one that users would have."""
    config = json.loads((pair[0] / "config.json").read_text())
    assert config["model_type"] in MODELS
