"""Output items of a response, while an answer is read."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from engine import Delta, TokenLogprob, Usage
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


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def turns(*texts: str, remote: str = "f") -> tuple[ResponseComposer, list[dict[str, Any]]]:
    """Turns of an answer whose tool `remote` belongs to a server that answers every call."""
    parser = partial(AnswerParser, style=HERMES, names=["f", "g"])
    composer = ResponseComposer(
        "resp_1", {}, byte_tokenizer(), logprobs=False, parser=parser, remote={remote: "it"}
    )
    events = composer.begin(queued=False)
    for text in texts:
        usage = Usage(prompt_tokens=10, completion_tokens=len(text))
        events += composer.delta(Delta(text=text))
        events += composer.delta(Delta(finish_reason="stop", usage=usage))
        told, calls, waits = composer.end_turn()
        events += told
        for number, call in enumerate(calls):
            events += composer.called(call, f"result {number}", None)
        if calls and not waits:
            composer.next_turn(parser)
    return composer, events + composer.end()


def test_calls_of_one_turn_are_made_together_and_of_two_after_each_other() -> None:
    together, _ = turns(CALL * 2, "Done.")
    assert [m["role"] for m in together.spoken] == ["assistant", "tool", "tool", "assistant"]
    after, _ = turns(CALL, CALL, "Done.")
    roles = [m["role"] for m in after.spoken]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert after.made_tokens == 2 * len(CALL) + 5
    assert all(item.status == "completed" for item in after.items)


def test_a_call_for_the_client_ends_the_answer_and_is_remembered() -> None:
    composer, events = turns(CALL.replace("f", "g", 1), remote="f")
    (item,) = composer.items
    assert (item.kind, item.status) == ("function_call", "completed")
    assert composer.spoken[0]["tool_calls"][0]["function"]["name"] == "g"
    assert events[-1]["type"] == "response.completed"


def test_what_was_not_called_is_told() -> None:
    parser = partial(AnswerParser, style=HERMES, names=["f"])
    composer = ResponseComposer(
        "resp_1", {}, byte_tokenizer(), logprobs=False, parser=parser, remote={"f": "it"}
    )
    events = composer.begin(queued=False) + composer.delta(Delta(text=CALL))
    events += composer.delta(Delta(finish_reason="length"))
    assert composer.end_turn() == ([], [], False)
    events += composer.end()
    kinds = [event["type"] for event in events]
    assert kinds[-3:] == [
        "response.mcp_call.failed",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert composer.items[0].error
