"""What a later turn of an answer is submitted with."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest

from engine import AsyncEngine, DeadlineExceeded, Delta, Overloaded, SamplingParams, Terms
from server.answer_parser import AnswerParser
from server.answering import Answering
from server.bridge.rounds import Rounds
from server.bridge.servers import RemoteTool, ServerEntry, Servers
from server.dialect import HERMES
from server.openai import Generation
from server.response_composer import ResponseComposer
from server.shapes import ChatShape
from tests.mock import byte_tokenizer, mock_engine

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def rounds_of(engine: AsyncEngine, terms: Terms) -> Rounds:
    """After a first turn that has called a server which is not there."""
    parser = partial(AnswerParser, style=HERMES, names=["f"])
    composer = ResponseComposer(
        "resp_1", {}, byte_tokenizer(), logprobs=False, parser=parser, remote={"f": "it"}
    )
    composer.begin(queued=False)
    composer.delta(Delta(text=CALL, finish_reason="stop"))

    async def prepare(messages: list[dict[str, Any]], first: bool, may_call: bool) -> Answering:
        assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
        return Answering([1, 2, 3])

    params = SamplingParams(max_tokens=4)
    shape = ChatShape(byte_tokenizer(), logprobs=False)
    return Rounds(
        engine,
        Servers({"it": ServerEntry(url="http://127.0.0.1:9/mcp", timeout_seconds=1)}),
        [RemoteTool("it", "f", "", {})],
        composer,
        Generation([[1]], params, shape, terms, {}),
        [{"role": "user", "content": "hi"}],
        prepare,
        None,
    )


async def test_it_waits_for_a_place_in_the_queue() -> None:
    engine, executor = mock_engine(max_running=1, max_waiting=1)
    executor.delay = 0.02
    async with engine:
        first = await engine.submit([5, 6], SamplingParams(max_tokens=100))
        await first.receive()
        await engine.submit([5, 6], SamplingParams(max_tokens=5))
        with pytest.raises(Overloaded):
            await engine.submit([5, 6], SamplingParams(max_tokens=5))
        stream = await rounds_of(engine, Terms()).next("resp_1", lambda events: None)
        assert stream is not None
        got = [delta async for delta in stream]
    assert got[-1].finish_reason == "length"


async def test_it_has_what_is_left_of_the_deadline() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.05
    async with engine:
        rounds = rounds_of(engine, Terms(deadline=0.6, first_token_deadline=0.01))
        time.sleep(0.6)  # noqa: ASYNC251  (as long as its calls took)
        with pytest.raises(DeadlineExceeded):
            await rounds.next("resp_1", lambda events: None)
