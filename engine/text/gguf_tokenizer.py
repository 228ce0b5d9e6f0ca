"""Rebuilds a tokenizer from a GGUF file's metadata.

Byte-level BPE files ("gpt2") carry vocabulary and merges, and name their pre-tokenizer.
SentencePiece files ("llama") carry scores instead of merges: a merge's priority is the score of the
piece it makes (Kudo and Richardson, arXiv 1808.06226). Gemma 4's ("gemma4") cut text likewise, and
carry merges.
"""

from __future__ import annotations

from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from engine.errors import ConfigError
from engine.text.tokenizer import HARMONY_ENDS, Tokenizer, ends_among

Item = TypeVar("Item", str, int, float)

CONTROL, USER_DEFINED = 3, 4
SENTENCEPIECE = ("llama", "gemma4")
# Phi-3's other special tokens swallow the whitespace behind them, which its files do not say.
PLAIN = ("<unk>", "<s>", "<|endoftext|>")
# Other names of a kind: Llama 3's, and Qwen 2's in models distilled from DeepSeek R1.
KINDS = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "lfm2": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "refact": "smollm",  # Granite's
}
# Kinds that start with BOS if the file does not say, and those that take a word that is a token
# whole, whatever its merges would give.
STARTING = ("llama-bpe", "tekken")
WHOLE_WORDS = (*STARTING, "glm4")
# Cased letters alone, which DeepSeek's first vocabularies list; and ideographs.
CASED_LETTERS = r"[\p{Lu}\p{Ll}\p{Lt}]"
# Word-splitting patterns that the model families publish in their tokenizer.json.
CASELESS_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LLAMA_3 = CASELESS_CONTRACTIONS + r"\p{N}{1,3}" + TAIL
PATTERNS = {
    "llama-bpe": LLAMA_3,
    # Others that cut words likewise, but know no whole ones.
    "dbrx": LLAMA_3,
    "smaug-bpe": LLAMA_3,
    "chatglm-bpe": LLAMA_3,
    "glm4": LLAMA_3,
    "seed-coder": (
        CASELESS_CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": CASELESS_CONTRACTIONS + r"\p{N}" + TAIL,
    # Qwen 3.5's: marks are parts of words.
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Mistral's: a capital begins a word.
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}*{CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}+{CASED[1]}*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # That of OpenAI's o200k vocabulary, which Phi 4 mini has as well.
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}*{CASED[1]}+{CONTRACTION}|"
        rf"[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}+{CASED[1]}*{CONTRACTION}|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# Those that cut what the ones before them left.
SEQUENCES = {
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{CASED_LETTERS}+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        (
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|"
            r"\s+(?!\S)|\s+"
        ),
    ),
    **{kind: (pattern,) for kind, pattern in PATTERNS.items()},
}


def tokenizer_from_gguf(metadata: dict[str, Any], file: str) -> Tokenizer:
    """Build the tokenizer; ConfigError names the key that is missing or not supported."""
    kind = _need(metadata, "tokenizer.ggml.model", file)
    tokens = _list(metadata, "tokenizer.ggml.tokens", str, file)
    types = [1] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _list(metadata, "tokenizer.ggml.token_type", int, file, length=len(tokens))
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, file)
    elif kind in SENTENCEPIECE:
        backend = _sentencepiece(metadata, tokens, kind, file)
    else:
        known = ", ".join(("gpt2", *SENTENCEPIECE))
        raise ConfigError(f"{file}: key 'tokenizer.ggml.model' is {kind!r}; these work: {known}")
    phi = kind == "llama" and metadata.get("general.architecture") == "phi3"
    for token_type, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [t for t, kind in zip(tokens, types, strict=True) if kind == token_type and t]
        added = [
            AddedToken(
                t, special=special, normalized=False, rstrip=special and phi and t not in PLAIN
            )
            for t in chosen
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    bos, eos = (_id(metadata, name, tokens, file) for name in ("bos", "eos"))
    # Files that lack the key follow their kind; SentencePiece models start with BOS.
    starts = kind in SENTENCEPIECE or _pre(metadata) in STARTING
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", starts):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    # llama.cpp's converter shows Gemma's marks as if they were text.
    marking = (CONTROL, USER_DEFINED) if kind == "gemma4" else (CONTROL,)
    controls = {t: i for i, t in enumerate(tokens) if types[i] in marking}
    ends = {controls[t] for t in ends_among(controls)}
    named = {i for n in ("eos", "eot", "eom") if (i := _id(metadata, n, tokens, file)) is not None}
    # What ends a message may be called the end of a turn, though the answer goes on.
    inner = {"<|end|>"} if controls.keys() >= set(HARMONY_ENDS) else set()
    ends |= {i for i in named if tokens[i] not in inner}
    return Tokenizer(
        backend,
        bos_token=tokens[bos] if bos is not None else None,
        eos_token=tokens[eos] if eos is not None else None,
        eos_token_ids=ends,
        chat_template=_template(metadata, file),
    )


def _pre(metadata: dict[str, Any]) -> str:
    """How a byte-level tokenizer cuts words."""
    pre = str(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    return KINDS.get(pre, pre)


def _byte_level(metadata: dict[str, Any], tokens: list[str], file: str) -> Backend:
    pre = _pre(metadata)
    merges = _written(metadata, file)
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS)
    except Exception as error:
        raise ConfigError(f"{file}: key 'tokenizer.ggml.merges': {error}") from error
    backend = Backend(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SEQUENCES)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre in SEQUENCES:
        splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in SEQUENCES[pre]]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    elif pre == "gpt-2":
        backend.pre_tokenizer = byte_level
    else:
        known = ", ".join(["smollm", "gpt-2", *SEQUENCES])
        raise ConfigError(f"{file}: key 'tokenizer.ggml.pre' is {pre!r}; these work: {known}")
    if pre in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _written(metadata: dict[str, Any], file: str) -> list[tuple[str, str]]:
    """Merges that the file has, the first of most priority."""
    lines = _list(metadata, "tokenizer.ggml.merges", str, file)
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], kind: str, file: str) -> Backend:
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gemma4":
        merges = _written(metadata, file)
    else:
        scores = _list(metadata, "tokenizer.ggml.scores", float, file, length=len(tokens))
        merges = _merges(vocab, scores)
    unknown = _id(metadata, "unknown", tokens, file)
    try:
        model = models.BPE(
            vocab,
            merges,
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:
        raise ConfigError(f"{file}: key 'tokenizer.ggml.merges': {error}") from error
    backend = Backend(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", kind == "llama")
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left = vocab.get(piece[:cut])
            if left is None:
                continue
            right = vocab.get(piece[cut:])
            if right is not None:
                merges.append((-scores[number], left, right, piece[:cut], piece[cut:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _need(metadata: dict[str, Any], key: str, file: str) -> Any:
    if key not in metadata:
        raise ConfigError(f"{file} has no key {key!r}")
    return metadata[key]


def _list(
    metadata: dict[str, Any], key: str, kind: type[Item], file: str, *, length: int | None = None
) -> list[Item]:
    """An array of the metadata, with its items' type and its length checked."""
    value = _need(metadata, key, file)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ConfigError(f"{file}: key {key!r} is not a list of {kind.__name__}")
    if length is not None and len(value) != length:
        raise ConfigError(f"{file}: key {key!r} has {len(value)} items for {length} tokens")
    return value


def _template(metadata: dict[str, Any], file: str) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{file}: key 'tokenizer.chat_template' is not text")
    return template


def _id(metadata: dict[str, Any], name: str, tokens: list[str], file: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(tokens):
        raise ConfigError(f"{file}: key {key!r} is {value!r}, beyond the vocabulary")
    return value
