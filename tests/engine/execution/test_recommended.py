"""What a model's makers recommend, and what becomes of it."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine import AsyncEngine, ConfigError, SamplingParams
from engine.execution.recommended import recommended_sampling
from engine.weights.checkpoint import open_checkpoint
from engine.weights.sources import KNOWN_MODELS
from tests.tiny import write_llama


def folder_with(path: Path, generation: dict[str, Any] | None) -> Path:
    folder = write_llama(path / "tiny")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def gguf_with(path: Path, sampling: dict[str, float]) -> Path:
    file = path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in sampling.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_folder_says_it_in_its_generation_config(tmp_path: Path) -> None:
    said = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "eos_token_id": 3}
    checkpoint = open_checkpoint(folder_with(tmp_path, said))
    assert recommended_sampling(checkpoint, "tiny") == {"temperature": 0.6, "top_k": 20}


def test_a_gguf_says_it_in_its_metadata(tmp_path: Path) -> None:
    said = {"temp": 0.5, "top_k": 40, "min_p": 0.25, "penalty_repeat": 1.5, "mirostat_tau": 5.0}
    checkpoint = open_checkpoint(gguf_with(tmp_path, said))
    expected = {"temperature": 0.5, "top_k": 40, "min_p": 0.25, "repetition_penalty": 1.5}
    assert recommended_sampling(checkpoint, "tiny") == expected


def test_a_known_model_whose_file_says_nothing_has_its_cards(tmp_path: Path) -> None:
    silent = open_checkpoint(folder_with(tmp_path, None))
    assert recommended_sampling(silent, "tiny") == {}
    known = KNOWN_MODELS["smollm2-135m"].sampling
    assert recommended_sampling(silent, "smollm2-135m") == known != {}
    said = open_checkpoint(folder_with(tmp_path, {"top_k": 5}))
    assert recommended_sampling(said, "smollm2-135m") == {"top_k": 5}


@pytest.mark.parametrize(
    "said", [{"temperature": -1.0}, {"top_p": "much"}, {"top_k": 1.5}, {"min_p": True}]
)
def test_what_cannot_be_drawn_with_is_refused_by_name(tmp_path: Path, said: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(folder_with(tmp_path, said))
    with pytest.raises(ConfigError, match=r"generation_config\.json recommends") as refused:
        recommended_sampling(checkpoint, "tiny")
    assert next(iter(said)) in str(refused.value)


@pytest.mark.parametrize("heeded", [True, False])
async def test_requests_without_parameters_are_drawn_so(tmp_path: Path, heeded: bool) -> None:
    folder = folder_with(tmp_path, {"temperature": 0.0, "top_k": 7})
    settings = {"model__recommended_sampling": heeded, "cache__tokens": 1024}
    async with AsyncEngine.from_pretrained(str(folder), **settings) as engine:

        async def drawn(params: SamplingParams | None = None) -> list[int]:
            ids: list[int] = []
            async with aclosing(engine.generate("hello", params)) as deltas:
                async for delta in deltas:
                    ids += delta.token_ids
                    if len(ids) >= 24:
                        break
            return ids[:24]

        greedy = await drawn(SamplingParams(max_tokens=24, temperature=0))
        found = [await drawn() for _ in range(4)]
        assert (found == [greedy] * 4) is heeded
        assert engine.parts.recommended == ({"temperature": 0.0, "top_k": 7} if heeded else {})
