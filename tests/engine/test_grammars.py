"""Answers under a grammar, through the whole engine."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema_rs
import pytest
from llguidance import LLParserLimits

from engine import AsyncEngine, Grammar, InvalidRequest, SamplingParams
from engine.text.grammar import GrammarCompiler
from engine.types import RequestStats, StepStats
from tests.mock import VOCAB, byte_tokenizer, mock_engine

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def answer(engine: AsyncEngine, grammar: Grammar, **params: object) -> tuple[str, str | None]:
    text, reason = "", None
    sampling = SamplingParams(grammar=grammar, **{"max_tokens": 60, **params})
    async for delta in engine.generate("hello", sampling):
        text += delta.text
        reason = delta.finish_reason or reason
    return text, reason


async def test_what_ends_by_itself_matches() -> None:
    engine, _ = mock_engine()
    async with engine:
        text, reason = await answer(engine, Grammar.json_schema(PERSON))
        assert reason == "stop", text
        jsonschema_rs.validate(PERSON, json.loads(text))


async def test_with_and_without_a_grammar_in_one_batch() -> None:
    engine, _ = mock_engine()
    pattern = Grammar("regex", "[a-m]{5}x")
    async with engine:
        free = [engine.generate("hello", SamplingParams(max_tokens=20)) for _ in range(2)]

        async def read(deltas: object) -> str:
            return "".join([d.text async for d in deltas])  # type: ignore[attr-defined]

        first, second, bound, other = await asyncio.gather(
            *map(read, free), answer(engine, pattern), answer(engine, Grammar("choice", '["no"]'))
        )
    assert first == second
    assert len(first) == 20
    assert re.fullmatch("[a-m]{5}x", bound[0])
    assert other == ("no", "stop")


async def test_every_choice_follows_it_alone() -> None:
    engine, _ = mock_engine()
    texts = ["", "", ""]
    async with engine:
        params = SamplingParams(n=3, max_tokens=30, grammar=Grammar("regex", "[a-z]{7}!"))
        async for delta in engine.generate("hello", params):
            texts[delta.index] += delta.text
    assert all(re.fullmatch("[a-z]{7}!", text) for text in texts)


async def test_it_goes_on_where_it_was_after_being_set_aside() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.002
    grammar = Grammar("regex", "[a-z]{40}!")
    async with engine:
        alone, _ = await answer(engine, grammar)
        stream = await engine.submit("hello", SamplingParams(max_tokens=60, grammar=grammar))
        text, deltas = "", 0
        async for delta in stream:
            text += delta.text
            deltas += 1
            if deltas == 5:
                engine.pause(*stream.request_ids)
                await asyncio.sleep(0.05)
                engine.unpause(*stream.request_ids)
    assert text == alone


async def test_a_bad_grammar_is_refused_before_the_queue() -> None:
    engine, _ = mock_engine()
    async with engine:
        with pytest.raises(InvalidRequest, match="unclosed group"):
            await answer(engine, Grammar("regex", "(a"))
        assert engine.active_requests == 0


@pytest.mark.parametrize("field", [{"min_tokens": 3}, {"ignore_eos": True}], ids=str)
async def test_what_would_keep_an_answer_from_its_end_is_refused(field: dict[str, int]) -> None:
    engine, _ = mock_engine()
    async with engine:
        with pytest.raises(InvalidRequest, match="cannot be combined") as refused:
            await answer(engine, Grammar("regex", "a"), **field)
    assert refused.value.param == next(iter(field))


async def test_a_grammar_that_outgrows_its_limits_ends_its_request_alone() -> None:
    engine, executor = mock_engine()
    executor._compiler = GrammarCompiler(
        byte_tokenizer, VOCAB, LLParserLimits(max_items_in_row=20, verbose_errors=False)
    )
    # Ambiguous: the longer the text, the more ways there are to read it.
    grammar = Grammar("lark", "start: x\nx: x x | /[a-z]/ | /[a-z][a-z]/")
    ends: list[str] = []

    class Ends:
        def on_step(self, stats: StepStats) -> None: ...

        def on_request(self, stats: RequestStats) -> None:
            ends.append(stats.finish_reason)

    async with engine:
        engine.add_listener(Ends())
        other = asyncio.create_task(answer(engine, Grammar("regex", "[a-z]{50}")))
        with pytest.raises(InvalidRequest, match="cannot be followed any further"):
            await answer(engine, grammar)
        assert (await other)[1] == "stop"
        assert engine.health() == "ok"
    # Errors are what we are paged for; this was the request's own.
    assert sorted(ends) == ["refused", "stop"]
