"""Output items of a response, while an answer is read."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from engine import Delta, TokenLogprob
from server.answer_parser import AnswerParser
from server.dialect import HERMES
from server.response_composer import ResponseComposer
from tests.mock import byte_tokenizer


def composed(text: str, **more: Any) -> tuple[ResponseComposer, list[dict[str, Any]]]:
    parser = partial(AnswerParser, style=HERMES, names=["f"])
    composer = ResponseComposer("resp_1", {}, byte_tokenizer(), parser=parser, **more)
    events = composer.begin(queued=False)
    for char in text:
        score = TokenLogprob(ord(char), -1.0)
        events += composer.delta(Delta(text=char, token_ids=[ord(char)], logprobs=[score]))
    events += composer.delta(Delta(finish_reason="stop"))
    return composer, events + composer.end()


@pytest.mark.parametrize("arguments", ['{"a": 1]}', "{'x'}", '{"a": ', "null", "[" * 99])
def test_a_call_that_breaks_off_is_none_to_go_on_from(arguments: str) -> None:
    composer, _ = composed(f'<tool_call>{{"name": "f", "arguments": {arguments}', logprobs=False)
    calls = [item for item in composer.items if item.kind == "function_call"]
    assert all(call.status == "incomplete" for call in calls)
    assert not any(message.get("tool_calls") for message in composer.spoken)


def test_a_whole_call_is_part_of_the_conversation() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    composer, _ = composed(f"Well. {call}", logprobs=False)
    (message,) = composer.spoken
    assert message["content"] == "Well."
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_no_tokens_score_is_lost_while_text_is_held_back() -> None:
    text = "a < b  and <tool"
    composer, events = composed(text, logprobs=True)
    (item,) = composer.items
    assert item.text == text
    assert [score["token"] for score in item.logprobs] == list(text)
    told = [s for e in events if e["type"].endswith("text.delta") for s in e["logprobs"]]
    assert len(told) >= len(text) - 1
