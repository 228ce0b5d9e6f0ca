"""What a rank reads, and what that takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.weights.checkpoint import open_checkpoint
from tests.kernels.native import needs_native
from tests.real import smollm2_path
from tests.tiny import write_llama

ROOT = Path(__file__).parents[3]


def load(path: Path, warm_up: Path, rank: int, ranks: int) -> dict[str, int]:
    arguments = [str(path), str(rank), str(ranks), str(warm_up)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.execution.loaded", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@needs_native
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_loading_takes_little_more_memory_than_the_shard(tmp_path: Path, kind: str) -> None:
    small = write_llama(tmp_path / "small")
    path = smollm2_path()
    if kind == "safetensors":
        path = write_llama(
            tmp_path / "large", hidden_size=512, intermediate_size=4096, vocab_size=32000
        )
    whole = load(path, small, 0, 1)["weights"]
    shards = [load(path, small, rank, 2) for rank in range(2)]
    assert sum(shard["weights"] for shard in shards) < 1.02 * whole
    for shard in shards:
        assert shard["peak"] < 1.2 * shard["weights"], shard


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_part_of_a_tensor_is_what_that_part_of_the_whole_is(tmp_path: Path, kind: str) -> None:
    path = smollm2_path() if kind == "gguf" else write_llama(tmp_path / "model")
    checkpoint = open_checkpoint(path)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ):
        tensor = checkpoint.tensor(name)
        whole, unit = tensor.dense().float(), tensor.block
        rows = tensor.narrow(0, 5, 20)
        assert rows.shape == (20, whole.shape[1])
        assert (rows.dense().float() == whole[5:25]).all()
        width = whole.shape[1] // unit // 2 * unit
        part = tensor.narrow(1, width, unit).narrow(0, 3, 9).narrow(0, 1, 4)
        assert (part.dense().float() == whole[4:8, width : width + unit]).all()
