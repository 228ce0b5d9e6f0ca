"""Models from the hub, whose client is replaced: it cannot be reached from every test machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from engine.errors import ConfigError
from engine.weights.sources import resolve

Hub = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A repository of the files that it is called with; the folder is what has been downloaded."""

    def repository(*files: str) -> Path:
        def listed(self: Any, name: str, revision: str) -> list[str]:
            assert (name, revision) == ("org/name", "v1")
            return list(files)

        def download(name: str, **options: Any) -> str:
            assert (name, options["revision"]) == ("org/name", "v1")
            patterns = {k: options[k] for k in ("allow_patterns", "ignore_patterns")}
            for file in filter_repo_objects(list(files), **patterns):
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return tmp_path

    return repository


def found(name: str) -> Path:
    return resolve(f"hf:org/name{name}", revision="v1")


def downloaded(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_of_a_repository_in_the_hubs_layout_safe_files_are_taken(hub: Hub) -> None:
    files = ("config.json", "tokenizer.json", "model.safetensors")
    others = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "x-Q4_0.gguf")
    folder = hub(*files, *others, "onnx/config.json", "original/model.safetensors")
    assert found("") == folder
    assert downloaded(folder) == set(files)


def test_a_quantization_is_a_word_of_a_files_name(hub: Hub) -> None:
    names = ("Q4_0", "IQ4_0", "Q4_0_4_4", "Q4_K_M", "Q8_0")
    folder = hub(*(f"model-{name}.gguf" for name in names), "mmproj-model-Q4_0.gguf")
    assert found(":Q4_0") == folder / "model-Q4_0.gguf"
    assert downloaded(folder) == {"model-Q4_0.gguf"}
    assert found(":q8_0") == folder / "model-Q8_0.gguf"


@pytest.mark.parametrize(
    "name",
    [
        *("model.q4_k_m.gguf", "Q4_K_M.gguf", "sub/model-Q4_K_M.gguf", "m-q4_K_M.gguf"),
        *("Q4_K_M/model.gguf", "[a]-Q4_K_M.gguf"),
    ],
)
def test_names_are_written_in_many_ways(hub: Hub, name: str) -> None:
    assert found_in(hub(name, "model-Q6_K.gguf")) == name


def found_in(folder: Path) -> str:
    return found(":Q4_K_M").relative_to(folder).as_posix()


def test_a_split_model_comes_with_all_its_parts(hub: Hub) -> None:
    parts = [f"Q4_K_M/model-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    folder = hub(*parts, "Q8_0/model-Q8_0-00001-of-00001.gguf")
    assert found(":Q4_K_M") == folder / parts[0]
    assert downloaded(folder) == set(parts)


def test_a_file_can_be_named_and_any_of_its_parts(hub: Hub) -> None:
    parts = [f"big-0000{n}-of-00002.gguf" for n in (1, 2)]
    folder = hub("UD/model-Q4_K_M.gguf", "model-Q4_K_M.gguf", *parts)
    assert found(":UD/model-Q4_K_M.gguf") == folder / "UD/model-Q4_K_M.gguf"
    assert found(f":{parts[1]}") == folder / parts[0]
    assert downloaded(folder) == {"UD/model-Q4_K_M.gguf", *parts}


@pytest.mark.parametrize(
    ("names", "taken"), [(("Q2_K", "Q4_K_M", "Q4_0"), "Q4_K_M"), (("Q8_0", "Q4_0"), "Q4_0")]
)
def test_without_a_word_the_usual_one_is_taken(
    hub: Hub, names: tuple[str, ...], taken: str
) -> None:
    folder = hub("config.json", *(f"model-{name}.gguf" for name in names))
    assert found("") == folder / f"model-{taken}.gguf"
    assert downloaded(folder) == {f"model-{taken}.gguf"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"nor a GGUF file of Q4_K_M, Q4_0, Q8_0; if it has others"),
        (":Q4_K_M", r"has no GGUF file called or quantized Q4_K_M"),
        (":other.gguf", r"has no GGUF file called or quantized other\.gguf"),
        (":Q5_K_M", r"several GGUF files of Q5_K_M: a-Q5_K_M\.gguf, b-Q5_K_M\.gguf; say which: "),
    ],
)
def test_what_is_not_there_or_not_clear_is_said(hub: Hub, name: str, message: str) -> None:
    hub("a-Q5_K_M.gguf", "b-Q5_K_M.gguf")
    with pytest.raises(ConfigError, match=message):
        found(name)


def test_nothing_is_downloaded_before_it_is_clear_what(hub: Hub) -> None:
    folder = hub("a-Q5_K_M.gguf", "b-Q5_K_M.gguf")
    for name in (":Q5_K_M", ":*", ""):
        with pytest.raises(ConfigError):
            found(name)
    assert downloaded(folder) == set()


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raised(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", raised)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raised)


def refused(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """An answer of the hub's as its client tells it: what it means comes last."""
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
    return kind(f"{status} Client Error. (Request ID: x)\n\nWhy.", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("no connection\nlong"),
            "cannot download hf:org/name: no connection$",
        ),
        (RuntimeError("\nno data\n"), "cannot download hf:org/name: no data$"),
        (ValueError(), "cannot download hf:org/name: ValueError$"),
        (
            refused(GatedRepoError, 403),
            "hf:org/name has terms: accept them on its page, and set HF",
        ),
        (refused(RepositoryNotFoundError, 401), "there is no hf:org/name, or it is private"),
        (refused(RevisionNotFoundError, 404), "hf:org/name has no revision 'v1'"),
        (refused(HfHubHTTPError, 500), "cannot download hf:org/name: 500 Client Error"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    fail(monkeypatch, error)
    with pytest.raises(ConfigError, match=message):
        found("")


def test_a_download_that_breaks_off_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    hub("model.safetensors")

    def broken(*_: Any, **__: Any) -> str:
        raise TimeoutError("timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ConfigError, match=r"cannot download hf:org/name: timed out$"):
        found("")


def test_without_a_network_what_is_there_serves(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    folder = hub("config.json", "model-Q8_0.gguf", "model-Q4_K_M.gguf")
    assert found(":Q8_0") == folder / "model-Q8_0.gguf"

    def offline(*_: Any, **__: Any) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert found("") == found(":Q8_0") == folder / "model-Q8_0.gguf"
