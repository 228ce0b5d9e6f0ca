"""OpenAI's response bodies, streaming and whole, built from deltas."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from engine import TokenLogprob, Usage
from engine.text.tokenizer import Tokenizer


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """OpenAI's usage object."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Envelope(msgspec.Struct, frozen=True):
    """What every body of one response shares."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    def around_choice(self, **more: Any) -> tuple[bytes, bytes]:
        """The encoded bytes before and after the one choice of a chunk: they stay the same."""
        before, found, after = msgspec.json.encode(self.body([], **more)).partition(b'"choices":[')
        return before + found, after

    def body(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        """A whole body, or one chunk."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            **more,
        }


def envelope(request_id: str, kind: str, model: str, fingerprint: bytes) -> Envelope:
    """The envelope of a response that begins now."""
    return Envelope(request_id, kind, int(time.time()), model, f"fp_{fingerprint.hex()[:10]}")


def usage_body(usages: Sequence[Usage]) -> UsageBody:
    """The sum over a response's prompts."""
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    cached = sum(u.cached_tokens for u in usages)
    return UsageBody(prompt, completion, prompt + completion, PromptTokensDetails(cached))


def finish_reason(reason: str | None) -> str | None:
    """OpenAI knows `stop` and `length`; a cancelled answer is told as `stop` to nobody."""
    return "stop" if reason == "abort" else reason


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The chat endpoint's form: token, logprob, bytes, and alternatives likewise."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        {
            **entry(item.token_id, item.logprob),
            "top_logprobs": [entry(token, value) for token, value in item.top],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The plain endpoint's form, which counts characters from the text's start."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def take(
        self, logprobs: Sequence[TokenLogprob | None], prompt_ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        """The next tokens; `prompt_ids` names tokens that have no logprob (a prompt's first)."""
        body: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for number, item in enumerate(logprobs):
            text = self._text(item.token_id if item is not None else prompt_ids[number])
            body["text_offset"].append(self._offset)
            body["tokens"].append(text)
            body["token_logprobs"].append(None if item is None else _finite(item.logprob))
            body["top_logprobs"].append(None if item is None else self._top(item))
            self._offset += len(text)
        return body

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        """The best tokens by text, the chosen one always among them."""
        best = {self._text(token): _finite(value) for token, value in item.top}
        best.setdefault(self._text(item.token_id), _finite(item.logprob))
        return best

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot happen."""
    return max(logprob, -9999.0)
