"""Models from the Hugging Face hub: a repository in its layout, or one GGUF model out of several.

Named as llama.cpp names them: `org/name`, `org/name:Q4_K_M`, or `org/name:path/in/it.gguf`.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.weights.files import PART, gguf_parts

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
# Some repositories carry the same weights again: in their makers' own layout, or in folders.
DOUBLES = ["consolidated*", "*/*"]
# Of a repository that has nothing but GGUF files the first of these is taken.
USUAL = ("Q4_K_M", "Q4_0", "Q8_0")


def from_hub(name: str, revision: str | None) -> Path:
    """The local folder or GGUF file of a model, downloaded if it is not there yet. Raises
    ConfigError in one sentence if it cannot be had, or if it is not clear which is meant."""
    repository, _, wanted = name.partition(":")
    names = _names(repository, revision)
    if wanted:
        model = _choose(repository, names, wanted)
        if model is None:
            raise ConfigError(f"hf:{repository} has no GGUF file called or quantized {wanted}")
        return _gguf(repository, revision, model)
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return _download(repository, revision, FILES, DOUBLES)
    for usual in USUAL:
        model = _choose(repository, names, usual)
        if model is not None:
            return _gguf(repository, revision, model)
    raise ConfigError(
        f"hf:{repository} has neither *.safetensors nor a GGUF file of {', '.join(USUAL)}; if it "
        f"has others, say which: hf:{repository}:Q5_K_M"
    )


def _choose(repository: str, names: Sequence[str], wanted: str) -> str | None:
    """The GGUF file of this path in the repository, or with this quantization in its path; of a
    split model any part."""
    if wanted in names:
        return wanted
    # A word of its own: Q4_0 is not IQ4_0, nor Q4_0_4_4.
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
    models: dict[str, str] = {}
    for name in names:
        # What projects images is no model of its own.
        if name.endswith(".gguf") and word.search(name) and "mmproj" not in name:
            part = PART.fullmatch(name)
            models.setdefault(part[1] if part else name, name)
    if len(models) > 1:
        found = sorted(models.values())
        raise ConfigError(
            f"hf:{repository} has several GGUF files of {wanted}: {', '.join(found)}; "
            f"say which: hf:{repository}:{found[0]}"
        )
    return next(iter(models.values()), None)


def _gguf(repository: str, revision: str | None, name: str) -> Path:
    """A GGUF file, downloaded with all parts of its model."""
    pattern = glob.escape(name)
    if part := PART.fullmatch(name):
        pattern = f"{glob.escape(part[1])}-?????-of-{part[3]}.gguf"
    return gguf_parts(_download(repository, revision, [pattern]) / name)[0]


def _names(repository: str, revision: str | None) -> list[str]:
    """What the repository has; without a network, what has been downloaded of it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Its lines go where all go, once.
    logging.getLogger("huggingface_hub").handlers.clear()

    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _cannot(repository, revision, error) from error
    except Exception as error:  # noqa: BLE001  the client's own for a network that is not there
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception:  # noqa: BLE001  the first says why
            raise _cannot(repository, revision, error) from error
    return [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]


def _download(
    repository: str, revision: str | None, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    """The folder of a repository with the files of these patterns, those of before included."""
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
        )
    except Exception as error:
        raise _cannot(repository, revision, error) from error
    return Path(path)


def _cannot(repository: str, revision: str | None, error: Exception) -> ConfigError:
    """What went wrong, and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"hf:{repository} has terms: accept them on its page, and set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ConfigError(
            f"there is no hf:{repository}, or it is private: then set HF_TOKEN to a token that may "
            "read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"hf:{repository} has no revision {revision!r}")
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(f"cannot download hf:{repository}: {reason}")
