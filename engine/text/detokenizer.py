"""Token ids to text while they stream: whole characters only, stop strings held back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.text.tokenizer import Tokenizer


class StopMatcher:
    """Finds the first stop string in a growing text, releasing only what cannot become one."""

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that is safe to show, and the stop string if one is complete."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            at, stop = min(found, key=lambda f: (f[0], -len(f[1])))
            shown = self._held[: at + len(stop) if self._include else at]
            self._held = ""
            return shown, stop
        keep = self._undecided()
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown, None

    def flush(self) -> str:
        """What was held back, when the text ends without a stop."""
        held, self._held = self._held, ""
        return held

    def _undecided(self) -> int:
        """Length of the longest suffix that begins some stop string."""
        longest = min(max(len(s) for s in self._stops) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stops):
                return length
        return 0


class Detokenizer:
    """One choice's text, incrementally. The joined pieces equal the whole decoded at once."""

    __slots__ = ("_decoder", "_hidden", "_matcher", "_plain_texts", "_tokenizer", "_whole")

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._plain_texts = tokenizer.plain_texts
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._whole = True  # no character has begun and not ended
        self._matcher = StopMatcher(stops, include=include_stop) if stops else None

    def push(self, token_id: int, *, match: bool = True) -> tuple[str, str | None]:
        """The text that `token_id` decides, and the stop string if it completes one.

        With `match` off (fewer than min_tokens so far) stop strings are let through.
        """
        known = self._plain_texts.get(token_id) if self._whole else None
        text = known if known is not None else self._decode(token_id)
        return self._matcher.push(text) if match and self._matcher is not None else (text, None)

    def _decode(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if not self._whole or not data.isascii():
            text = self._decoder.decode(data)
            self._whole = not self._decoder.getstate()[0]
            return text
        text = data.decode("ascii")
        if token_id not in self._tokenizer.special_ids:
            self._plain_texts[token_id] = text
        return text

    def flush(self) -> str:
        """What was held back when the sequence ends: half a stop string, half a character."""
        held = "" if self._matcher is None else self._matcher.flush()
        return held + self._decoder.decode(b"", final=True)
