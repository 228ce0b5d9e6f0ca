"""Multi-head latent attention of native kernels, at the widths that models have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.models import cache_layout, load_model
from engine.weights.checkpoint import open_checkpoint
from kernels.backend import select_backend
from kernels.tape import Recorder
from tests.kernels.native import INSTRUCTION_SETS, logits_in_chunks, needs_native, program_of
from tests.tiny import DEEPSEEK, write_llama

pytestmark = needs_native
WIDE = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_size": 64,
    "num_attention_heads": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("latents"), **(DEEPSEEK | WIDE))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> torch.Tensor:
    backend, _ = select_backend("reference", dtype="float32", cache_dtype="auto", threads=1)
    model = load_model(open_checkpoint(folder), backend)
    backend.allocate_cache(cache_layout(model, 16, "float32"), 40)
    recorder = Recorder()
    program = backend.compile(recorder.finish(model.forward(recorder)), 512)
    return logits_in_chunks(program, TOKENS, [300])


TOKENS = torch.randint(3, 250, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(("cache", "bound"), [("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.2)])
def test_logits_are_the_references(
    folder: Path, wanted: torch.Tensor, instructions: str, cache: str, bound: float
) -> None:
    program, _ = program_of(folder, weights="float32", cache=cache, instructions=instructions)
    for chunks in ([300], [130, 1, 1, 30, 138]):
        logits = logits_in_chunks(program, TOKENS, chunks)
        error = (logits - wanted).abs().max() / wanted.abs().max()
        assert float(error) < bound
