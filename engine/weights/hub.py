"""Models from the Hugging Face hub: a repository in its layout, or one GGUF model out of several.

Named as llama.cpp names them: `org/name`, `org/name:Q4_K_M`, or `org/name:path/in/it.gguf`.
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import ConfigError
from engine.weights.files import gguf_parts

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
# Some repositories carry the same weights a second time in their makers' own layout.
DOUBLES = ["consolidated*"]
# What projects images, and is no model of its own.
NO_MODELS = ["*mmproj*"]
# Of a repository that has nothing but GGUF files the first of these is taken.
USUAL = ("Q4_K_M", "Q4_0", "Q8_0")


def from_hub(name: str, revision: str | None) -> Path:
    """The local folder or GGUF file of a model, downloaded if it is not there yet. Raises
    ConfigError in one sentence if it cannot be had, or if it is not clear which is meant."""
    repository, _, wanted = name.partition(":")
    if wanted:
        found = _find_gguf(repository, revision, wanted)
        if found is None:
            raise ConfigError(f"hf:{repository} has no GGUF file called or quantized {wanted}")
        return found
    folder = _download(repository, revision, FILES, DOUBLES)
    if any(folder.glob("*.safetensors")):
        return folder
    for usual in USUAL:
        found = _find_gguf(repository, revision, usual)
        if found is not None:
            return found
    raise ConfigError(
        f"hf:{repository} has neither *.safetensors nor a GGUF file of {', '.join(USUAL)}; if it "
        f"has others, say which: hf:{repository}:Q5_K_M"
    )


def _find_gguf(repository: str, revision: str | None, wanted: str) -> Path | None:
    """The GGUF file of this path in the repository, or with this quantization in its name."""
    if wanted.endswith(".gguf"):
        # All parts of a model that is split.
        pattern = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-?????-of-\1", wanted)
        folder = _download(repository, revision, [pattern])
        file = folder / wanted
        return gguf_parts(file)[0] if file.exists() else None
    # A word of its own: Q4_0 is not IQ4_0, nor Q4_0_4_4.
    other = "[!A-Za-z0-9_]"
    spellings = {wanted, wanted.lower(), wanted.upper()}
    patterns = [f"*{other}{word}{other}*gguf" for word in spellings]
    patterns += [f"{word}{other}*gguf" for word in spellings]
    folder = _download(repository, revision, patterns, NO_MODELS)
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
    models = {
        gguf_parts(file)[0]
        for file in folder.rglob("*.gguf")
        if word.search(file.name) and "mmproj" not in file.name
    }
    if len(models) > 1:
        names = sorted(model.relative_to(folder).as_posix() for model in models)
        raise ConfigError(
            f"hf:{repository} has several GGUF files of {wanted}: {', '.join(names)}; "
            f"say which: hf:{repository}:{names[0]}"
        )
    return models.pop() if models else None


def _download(
    repository: str, revision: str | None, patterns: list[str], ignored: list[str] | None = None
) -> Path:
    """The folder of a repository with the files of these patterns, those of before included.
    Without a network it is what is there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
        )
        return Path(path)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"cannot download hf:{repository}: {reason}") from error
