"""The GPU command at toy sizes, and the roofline's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.gpu import roofline
from kernels.gpu.catalogue import LLAMA_1B, LLAMA_8B, QWEN_06B
from perf import gpu, gpu_engine
from tests.kernels.gpu.interpreter import patch

patch()


# Triton's interpreter takes most of a minute, and a busy machine several times that.
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_command_checks_and_times_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert all(check["ok"] and check["races"] == 0 for check in result["checks"])
    assert result["engine"][0]["engine"]["tokens_per_second"] > 0
    assert {step["step"] for step in result["steps"]} == {"decode 2", "prefill"}
    assert "0 checks failed" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--smoke" in capsys.readouterr().err


def test_the_roofline_is_the_longer_of_moving_and_computing() -> None:
    assert roofline.weight_elements(LLAMA_1B) == pytest.approx(1.236e9, rel=1e-2)
    assert roofline.weight_elements(LLAMA_8B) == pytest.approx(7.5e9, rel=1e-2)
    assert roofline.kv_bytes(QWEN_06B) == 2 * 28 * 8 * 128 * 2
    one = roofline.step_seconds(LLAMA_1B, roofline.H100, 1, 0)
    assert 1 / one == pytest.approx(1355, rel=0.01)
    four = roofline.step_seconds(LLAMA_8B, roofline.H100, 1, 0, "int4")
    assert 1 / four == pytest.approx(840, rel=0.01)
    full = roofline.step_seconds(LLAMA_8B, roofline.H100, 4096, 0)
    assert full == pytest.approx(4096 * 2 * 7.5e9 / 989e12, rel=0.01)
    chunk = roofline.step_seconds(LLAMA_1B, roofline.H100, 2048, 1024, sequences=1)
    assert chunk < 1.3 * 2048 * 2 * 1.236e9 / 989e12
    assert roofline.card_of("NVIDIA H200") is roofline.H200
    assert roofline.card_of("NVIDIA A100") is None


def test_requests_go_through_the_engine_to_their_full_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.json"
    arguments = ["--smoke", "--requests", "5", "--guesses", "--http", "--json", str(file)]
    result = gpu_engine.measure(arguments)
    assert json.loads(file.read_text()) == result
    assert result["http"]["tokens_per_second"] > 0
    assert result["guesses"]["guessing_tokens_per_second"] > 0
    assert result["guesses"]["texts"] == 1
    found = result["engine"]
    assert found["tokens_per_second"] > 0
    assert found["device"].startswith("CPU, native")
    assert "toy engine" in capsys.readouterr().out
