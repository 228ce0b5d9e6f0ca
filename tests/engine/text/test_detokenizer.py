"""Incremental text: whole characters only, stop strings never shown in part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.text.detokenizer import Detokenizer, StopMatcher
from tests.mock import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(
    text: str, stops: tuple[str, ...] = (), *, include: bool = False
) -> tuple[str, str | None]:
    detokenizer = Detokenizer(TOKENIZER, stops, include_stop=include)
    shown = ""
    for byte in text.encode():
        piece, stop = detokenizer.push(byte)
        shown += piece
        if stop is not None:
            return shown, stop
    return shown + detokenizer.flush(), None


@given(st.text())
def test_the_pieces_join_to_the_whole_text(text: str) -> None:
    assert stream(text) == (text, None)


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_join_to_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(i)[0] for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == bytes(ids).decode("utf-8", errors="replace")


def test_a_split_character_appears_once_and_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(b)[0] for b in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_an_unfinished_character_shows_as_replacement_only_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push("é".encode()[0]) == ("", None)
    assert detokenizer.flush() == "�"


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    assert Detokenizer(TOKENIZER).push(EOS) == ("", None)
    assert Detokenizer(TOKENIZER, skip_special_tokens=False).push(EOS) == ("<eos>", None)


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stopping_is_what_searching_the_whole_text_gives(
    text: str, stops: list[str], include: bool
) -> None:
    shown, stop = stream(text, tuple(stops), include=include)
    # The first stop string to be complete ends the text, wherever it began.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    if not ends:
        assert (shown, stop) == (text, None)
        return
    end, _ = min(ends)
    start = min(at for e, at in ends if e == end)
    assert stop is not None
    assert shown == (text[:end] if include else text[:start])


@given(st.text(alphabet="abc", max_size=20), st.text(alphabet="abc", min_size=1, max_size=5))
def test_nothing_is_held_longer_than_needed(text: str, stop: str) -> None:
    matcher = StopMatcher([stop])
    seen = ""
    for character in text:
        piece, found = matcher.push(character)
        seen += piece
        if found:
            return
    rest = matcher.flush()
    assert seen + rest == text
    assert rest == "" or stop.startswith(rest)


def test_text_before_min_tokens_is_not_searched() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("ab",))
    early = [detokenizer.push(ord(c), match=False) for c in "ab"]
    assert early == [("a", None), ("b", None)]
    assert [detokenizer.push(ord(c)) for c in "ab"] == [("", None), ("", "ab")]
