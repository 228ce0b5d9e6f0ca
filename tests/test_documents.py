"""What the documents promise: settings, commands and examples that work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from engine import Config, load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "perf/README.md"]


def test_the_example_configuration_lists_every_setting_with_its_default() -> None:
    file = ROOT / "configs/cpu.toml"
    assert load_config(file) == Config()
    text = file.read_text()
    for section in Config.__struct_fields__:
        assert f"[{section}]" in text
        for field in type(getattr(Config(), section)).__struct_fields__:
            assert re.search(rf"^(# )?{field} = ", text, re.MULTILINE), f"{section}.{field}"


def test_the_configuration_for_a_gpu_can_be_read() -> None:
    config = load_config(ROOT / "configs/gpu.toml")
    assert config.execution.backend == "triton"
    assert config.scheduler.max_running > Config().scheduler.max_running


def test_documented_overrides_exist() -> None:
    for document in DOCUMENTS:
        for override in re.findall(r"--set ([a-z_.]+=[^\s`\"]+)", document.read_text()):
            if override != "a.b=c":
                load_config(None, [override])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r'(?:\]\(|src=")(?!http)([^)#"]+)', document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_python_examples_are_python(document: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        ast.parse(code)


def test_the_readmes_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example as printed, on a tiny model under the default model's name."""
    from tests.tiny import write_llama

    model = str(write_llama(tmp_path / "tiny"))
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [code for code in examples if "AsyncEngine" in code]
    exec(compile(example.replace("smollm2-135m", model), "README.md", "exec"), {})
    assert capsys.readouterr().out
