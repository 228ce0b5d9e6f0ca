"""Tokenizers from folders and from GGUF metadata, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from engine.errors import ConfigError, InvalidRequest
from engine.execution.tokenizer import open_tokenizer
from engine.text.chat import ChatTemplate
from engine.text.gguf_tokenizer import KINDS, PATTERNS, tokenizer_from_gguf
from engine.text.tokenizer import Tokenizer, byte_alphabet, load_tokenizer
from engine.weights.checkpoint import open_checkpoint
from tests.mock import byte_backend, byte_tokenizer
from tests.real import gemma3_path, smollm2_path
from tests.tiny import write_tokenizer

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_tokenizer(open_checkpoint(smollm2_path()))


def golden(model: str) -> list[tuple[str, list[int]]]:
    """Strings and the ids that llama.cpp gives them, special tokens parsed, no BOS added."""
    return [
        (text, ids)
        for text, ids in json.loads((DATA / f"llama_cpp_tokens_{model}.json").read_text())
    ]


@pytest.mark.parametrize(("text", "ids"), golden("smollm2"))
def test_smollm2_ids_equal_llama_cpp(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert b"".join(smollm2.token_bytes(i) for i in ids).decode() == text
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_gemma3_ids_equal_llama_cpp() -> None:
    tokenizer = open_tokenizer(open_checkpoint(gemma3_path()))
    for text, ids in golden("gemma3"):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [2, *ids]
        # SentencePiece writes spaces as U+2581, so that character itself comes back as a space.
        decoded = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
        assert decoded == text.replace("▁", " ")
    assert tokenizer.eos_token_ids == {1, 106}
    assert tokenizer.chat_template is None


def test_smollm2_knows_its_ends_and_its_template(smollm2: Tokenizer) -> None:
    assert smollm2.eos_token_ids == {0, 2}
    assert smollm2.chat_template is not None
    prompt = smollm2.chat_template.render([{"role": "user", "content": "hi"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_gives_special_tokens_ends_and_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = load_tokenizer(tmp_path, {"eos_token_id": 3})
    assert tokenizer.eos_token_ids == {7, 8, 256}
    assert tokenizer.special_ids == {256}
    assert tokenizer.chat_template is not None
    assert tokenizer.encode("hé") == list("hé".encode())


def test_a_template_file_wins_over_the_settings(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "beside"}))
    assert load_tokenizer(tmp_path, {}).chat_template.render([]) != "beside"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path, {}).chat_template.render([]) == "beside"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    tokenizer = load_tokenizer(tmp_path, {})
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([]) == "from the file"


def test_named_templates_and_token_objects(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    settings = {
        "eos_token": {"content": "<eos>"},
        "chat_template": [
            {"name": "tools", "template": "x"},
            {"name": "default", "template": "{{ eos_token }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path, {})
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([]) == "<eos>"


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path, {})
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path, {})


def test_ids_beyond_the_vocabulary_have_no_bytes() -> None:
    assert byte_tokenizer().token_bytes(9999) == b""


def byte_level(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a byte-level tokenizer; None removes a key."""
    tokens = [c for c, _ in sorted(byte_alphabet().items(), key=lambda p: p[1])]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, "he", "<user>", "<|im_end|>"],
        "token_type": [1] * 257 + [4, 3],
        "merges": ["h e"],
        "eos_token_id": 258,
    }
    metadata |= changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", *KINDS, *PATTERNS])
def test_every_byte_level_kind_round_trips(pre: str) -> None:
    tokenizer = tokenizer_from_gguf(byte_level(pre=pre), "m.gguf")
    text = "he said: I'll take 1234 <user> naïve\n\n  ones<|im_end|>"
    ids = tokenizer.encode(text)
    assert {256, 257, 258} <= set(ids)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text
    assert tokenizer.eos_token_ids == {258}


def test_glm_ends_its_answer_where_a_tools_result_is_to_come() -> None:
    letters = [c for c, _ in sorted(byte_alphabet().items(), key=lambda p: p[1])]
    metadata = byte_level(
        tokens=[*letters, "<|user|>", "<|observation|>", "<|endoftext|>", "<|x|>"],
        token_type=[1] * 256 + [3] * 4,
        merges=[],
        eos_token_id=258,
        eot_token_id=256,
        eom_token_id=259,
    )
    assert tokenizer_from_gguf(metadata, "m.gguf").eos_token_ids == {256, 257, 258, 259}


def test_gpt_oss_ends_messages_without_ending_its_answer(tmp_path: Path) -> None:
    letters = [c for c, _ in sorted(byte_alphabet().items(), key=lambda p: p[1])]
    marks = ["<|endoftext|>", "<|return|>", "<|call|>", "<|end|>"]
    metadata = byte_level(
        tokens=letters + marks,
        token_type=[1] * 256 + [3] * 4,
        merges=[],
        eos_token_id=257,
        eot_token_id=259,
    )
    assert tokenizer_from_gguf(metadata, "m.gguf").eos_token_ids == {256, 257, 258}
    byte_backend(*marks).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, {"eos_token_id": 258})  # <|return|>, behind <eos>
    assert tokenizer.eos_token_ids == {258, 259}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["He", "'s", " a", " MacOS", "-", "User", ",", " 1234", "!", "  \n"]),
        ("qwen2", ["He", "'s", " a", " MacOS", "-User", ",", " ", "1", "2", "3", "4", "!", "  \n"]),
        ("llama-bpe", ["He", "'s", " a", " MacOS", "-User", ",", " ", "123", "4", "!", "  \n"]),
        (
            "tekken",
            ["He", "'s", " a", " Mac", "OS", "-User", ",", " ", "1", "2", "3", "4", "!", "  \n"],
        ),
        ("gpt-4o", ["He's", " a", " Mac", "OS", "-User", ",", " ", "123", "4", "!", "  \n"]),
        ("dbrx", ["He", "'s", " a", " MacOS", "-User", ",", " ", "123", "4", "!", "  \n"]),
        ("glm4", ["He", "'s", " a", " MacOS", "-User", ",", " ", "123", "4", "!", "  \n"]),
        ("seed-coder", ["He", "'s", " a", " MacOS", "-User", ",", " ", "1", "2", "!", "\n"]),
        # A word in Devanagari, whose vowels are marks.
        ("qwen35", ["He", "'s", " हिन्दी", " MacOS", "-User", ",", " ", "1", "2", "!", "  \n"]),
        ("refact", ["He", "'s", " a", " MacOS", "-", "User", ",", " ", "1", "2", "!", "  \n"]),
    ],
)
def test_words_are_cut_as_the_family_cuts_them(pre: str, words: list[str]) -> None:
    """Merges reach only within a word."""
    backend = tokenizer_from_gguf(byte_level(pre=pre), "m.gguf")._backend
    found = backend.pre_tokenizer.pre_tokenize_str("".join(words))
    assert [backend.decoder.decode([word]) for word, _ in found] == words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no key 'tokenizer.ggml.model'"),
        ({"model": "t5"}, "'tokenizer.ggml.model' is 't5'"),
        ({"tokens": None}, "no key 'tokenizer.ggml.tokens'"),
        ({"merges": None}, "no key 'tokenizer.ggml.merges'"),
        ({"merges": ["zz yy"]}, "'tokenizer.ggml.merges'"),
        ({"pre": "other"}, "'tokenizer.ggml.pre' is 'other'"),
        ({"pre": ["a"]}, r"'tokenizer\.ggml\.pre' is \"\['a'\]\""),
        ({"eos_token_id": 9999}, "'tokenizer.ggml.eos_token_id' is 9999"),
        ({"model": "llama"}, "no key 'tokenizer.ggml.scores'"),
        ({"model": "llama", "scores": [0.0]}, "'tokenizer.ggml.scores' has 1 items for 259"),
        ({"model": "llama", "scores": 1}, "'tokenizer.ggml.scores' is not a list of float"),
        ({"tokens": 7}, "'tokenizer.ggml.tokens' is not a list of str"),
        ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens' is not a list of str"),
        ({"token_type": [1]}, "'tokenizer.ggml.token_type' has 1 items for 259"),
        ({"merges": 3}, "'tokenizer.ggml.merges' is not a list of str"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer_from_gguf(byte_level(**changes), "m.gguf")


def sentencepiece(prefix: bool) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece(prefix=True), "m.gguf")
    ids = tokenizer.encode("hello é")
    pieces = [tokenizer.token_bytes(i) for i in ids]
    assert pieces == [b"<s>", b" hello", b" ", b"\xc3", b"\xa9"]
    assert tokenizer.decode(ids) == "hello é"
    plain = tokenizer_from_gguf(sentencepiece(prefix=False), "m.gguf")
    assert plain.token_bytes(plain.encode("hello")[1]) == b"hello"


def test_special_tokens_of_phi_3_swallow_the_whitespace_behind_them() -> None:
    metadata = sentencepiece(prefix=False)
    plain = tokenizer_from_gguf(metadata, "m.gguf").encode("</s>\n hello")
    phi = metadata | {"general.architecture": "phi3"}
    tokenizer = tokenizer_from_gguf(phi, "m.gguf")
    assert tokenizer.encode("</s>\n hello") == tokenizer.encode("</s>hello") != plain
    assert tokenizer.encode("<s>\n hello") != tokenizer.encode("<s>hello")


def test_llama_3_files_start_with_bos_unless_they_say_otherwise() -> None:
    for pre in ("llama-bpe", "llama3", "llama-v3", "tekken"):
        tokenizer = tokenizer_from_gguf(byte_level(pre=pre, bos_token_id=257), "m.gguf")
        assert tokenizer.encode("he") == [257, 256]
    plain = byte_level(pre="llama-bpe", bos_token_id=257, add_bos_token=False)
    assert tokenizer_from_gguf(plain, "m.gguf").encode("he") == [256]
    assert tokenizer_from_gguf(byte_level(bos_token_id=257), "m.gguf").encode("he") == [256]


def test_added_whitespace_of_sentencepiece_files_is_shown_as_spaces(tmp_path: Path) -> None:
    backend = Backend(models.BPE({"a": 0, "▁": 1}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    backend.add_special_tokens([AddedToken("<▁>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, {})
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b"a", b" ", b"  ", "<▁>".encode()]


def test_training_settings_in_the_file_neither_cut_nor_fill_prompts(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.enable_truncation(8)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, {}).encode("x" * 30) == [ord("x")] * 30


def test_templates_run_in_a_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", bos_token="", eos_token="")
    with pytest.raises(InvalidRequest, match="unsafe"):
        template.render([])


def test_a_template_may_refuse_and_knows_the_usual_helpers() -> None:
    refusing = ChatTemplate(
        "{{ raise_exception('roles must alternate') }}", bos_token="", eos_token=""
    )
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        refusing.render([])
    assert error.value.param == "messages"
    source = "{{ bos_token }}{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
    helping = ChatTemplate(source, bos_token="<s>", eos_token="")
    assert helping.render([{"role": "é<"}]) == '<s>[{"role": "é<"}]4'


def test_a_broken_template_is_found_at_load() -> None:
    with pytest.raises(ConfigError, match="chat template is broken"):
        ChatTemplate("{% for %}", bos_token="", eos_token="")


def test_a_template_that_is_no_text_is_named() -> None:
    broken = byte_level() | {"tokenizer.chat_template": 5}
    with pytest.raises(ConfigError, match=r"'tokenizer\.chat_template' is not text"):
        tokenizer_from_gguf(broken, "m.gguf")
