"""Text to token ids and back, around the `tokenizers` package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from engine.errors import ConfigError, InvalidRequest
from engine.text.chat import ChatTemplate

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What models call their end-of-turn token, for files that name only one end-of-sequence token.
END_TOKENS = frozenset(
    (
        "<|endoftext|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|observation|>",
        "<end_of_turn>",
        "<turn|>",
        "<|tool_response>",
        "</s>",
        "<eos>",
    )
)
# How tokens are drawn and where answers end, in a folder in Hugging Face layout.
GENERATION = "generation_config.json"

# Models of OpenAI's harmony format end messages with <|end|>, and answers with these.
HARMONY_ENDS = ("<|return|>", "<|call|>")

# How model families name the three tokens of filling in the middle: Qwen and others, StarCoder,
# CodeGemma, DeepSeek, Code Llama.
INFILL_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def ends_among(tokens: Iterable[str]) -> set[str]:
    """Those of a vocabulary's marks that end an answer."""
    known = set(tokens)
    if known.issuperset(HARMONY_ENDS):
        return {*HARMONY_ENDS, "<|endoftext|>"} & known
    return known & END_TOKENS


def is_mark(text: str) -> bool:
    """Whether an added token's text is in brackets."""
    return len(text) > 2 and (text[0], text[-1]) in (("<", ">"), ("[", "]"))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: printable ones as they are, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    alphabet.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return alphabet


class Tokenizer:
    """Encodes prompts; gives each token's bytes, so that streams can be decoded exactly."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        # Files may carry the settings of a training run; prompts are never cut or filled here.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.chat_template = (
            ChatTemplate(chat_template, bos_token=bos_token or "", eos_token=eos_token or "")
            if chat_template
            else None
        )
        decoder = _decoder_state(backend)
        self._alphabet = byte_alphabet() if '"ByteLevel"' in decoder else None
        self._added = {i: self._added_bytes(token) for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        # Texts of tokens that are ASCII and not special, as far as they have been streamed.
        self.plain_texts: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own prefix (BOS) if `add_special_tokens`.

        Raises UnicodeEncodeError if `text` holds half of a surrogate pair.
        """
        text.encode()  # the package's own complaint about half a surrogate pair is a TypeError
        # Of a batch, since for one text the package holds the interpreter's lock.
        (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = found.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def mark_id(self, text: str) -> int | None:
        """The token that stands for a mark, such as `<tool_call>`, alone; None if none does."""
        found: int | None = self._backend.token_to_id(text) if is_mark(text) else None
        return found if found in self._added else None

    @property
    def mark_ids(self) -> frozenset[int]:
        """All tokens that have a meaning of their own: special ones, and added ones in brackets."""
        marks = (i for i, text in self._added.items() if is_mark(text.decode("utf-8", "replace")))
        return self.special_ids | frozenset(marks)

    @property
    def infill_ids(self) -> tuple[int, int, int] | None:
        """The tokens before a prefix, before a suffix and before what belongs between them, if the
        model was trained to fill in the middle (arXiv 2207.14255)."""
        for names in INFILL_TOKENS:
            before, after, between = (self._backend.token_to_id(name) for name in names)
            if before is not None and after is not None and between is not None:
                return before, after, between
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a character may span several tokens."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._to_bytes(token_id)
        return known

    def _added_bytes(self, token: AddedToken) -> bytes:
        """Added tokens stand for themselves, but SentencePiece writes spaces as U+2581 in them."""
        text: str = token.content
        if self._alphabet is None and not token.special:
            text = text.replace("▁", " ")
        return text.encode()

    def _to_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""  # models pad their vocabulary beyond the tokenizer's
        if self._alphabet is not None and all(c in self._alphabet for c in piece):
            return bytes(self._alphabet[c] for c in piece)
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _decoder_state(backend: Backend) -> str:
    """The decoder's JSON, which tells byte-level vocabularies from SentencePiece ones."""
    decoder = backend.decoder
    return decoder.__getstate__().decode() if decoder is not None else ""


def load_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face layout; `config` is its config.json."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ConfigError(f"{folder} has no tokenizer.json")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    settings = optional_json(folder / "tokenizer_config.json")
    generation = optional_json(folder / GENERATION)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = set(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    eos_token = _token_text(settings.get("eos_token"))
    if eos_token is not None and (found := backend.token_to_id(eos_token)) is not None:
        eos_ids.add(found)
    if all(backend.token_to_id(end) is not None for end in HARMONY_ENDS):
        eos_ids |= {backend.token_to_id(end) for end in HARMONY_ENDS}
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        template: Any = template_file.read_text(encoding="utf-8")
    else:
        # Processors of images wrote it to a file of its own.
        beside = optional_json(folder / "chat_template.json")
        template = settings.get("chat_template") or beside.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return Tokenizer(
        backend,
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=eos_token,
        eos_token_ids=eos_ids,
        chat_template=template,
    )


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none. Raises ConfigError if that is no JSON."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _token_text(value: Any) -> str | None:
    """Token settings are a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of several texts. Raises InvalidRequest if one is no text."""
    try:
        return [tokenizer.encode(t, add_special_tokens=add_special_tokens) for t in texts]
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "the text holds half of a surrogate pair, which is no character", param="prompt"
        ) from error
