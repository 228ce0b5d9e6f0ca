"""The engine's loop, driven by a model without weights."""

from __future__ import annotations

from contextlib import aclosing

import anyio
import pytest

from engine import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    SamplingParams,
    Terms,
)
from engine.errors import DeviceLost
from engine.types import Delta
from tests.engine.driving import Recorder, collect, text_of
from tests.mock import EOS, mock_engine


async def test_a_lost_device_ends_what_has_begun_and_nothing_that_waits() -> None:
    engine, executor = mock_engine(max_running=1, look_ahead=False)
    executor.delay = 0.01
    async with engine:
        begun = await engine.submit("one", SamplingParams(max_tokens=50))
        await begun.receive()
        waiting = await engine.submit("two", SamplingParams(max_tokens=4))
        executor.error = DeviceLost("gone")
        with pytest.raises(EngineFailed, match="gone"):
            _ = [delta async for delta in begun]
        text = "".join([delta.text async for delta in waiting])
    assert text == text_of("two", 4)


async def test_text_streams_token_by_token_and_ends_with_usage() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.002
    async with engine:
        deltas = [d async for d in engine.generate("hello", SamplingParams(max_tokens=6))]
    assert "".join(d.text for d in deltas) == text_of("hello", 6)
    assert len(deltas) > 1
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 6)


async def test_requests_share_steps_and_get_what_they_would_alone() -> None:
    engine, executor = mock_engine(pages=40, max_running=4)
    prompts = [f"prompt number {i}" for i in range(10)]
    results: dict[str, str] = {}

    async def one(prompt: str) -> None:
        results[prompt] = (await collect(engine, prompt, max_tokens=12)).text

    async with engine, anyio.create_task_group() as group:
        for prompt in prompts:
            group.start_soon(one, prompt)
    assert results == {p: text_of(p, 12) for p in prompts}
    assert max(len(plan.decodes) for plan in executor.plans) == 4
    assert engine.parts.scheduler.pool.used == 0


async def test_choices_are_told_apart_by_index() -> None:
    engine, _ = mock_engine()
    async with engine:
        stream = await engine.submit("abc", SamplingParams(max_tokens=3, n=3))
        texts: dict[int, str] = {}
        usages = []
        async for delta in stream:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            usages += [delta.usage] if delta.usage else []
    assert texts == dict.fromkeys(range(3), text_of("abc", 3))
    assert [u.completion_tokens for u in usages] == [9]


async def test_a_stop_string_is_cut_and_named() -> None:
    whole = text_of("hello", 20)
    engine, _ = mock_engine()
    async with engine:
        merged = await collect(engine, "hello", max_tokens=20, stop=(whole[5:8],))
    assert merged.text == whole[:5]
    assert (merged.finish_reason, merged.stop_reason) == ("stop", whole[5:8])
    assert merged.usage is not None
    assert merged.usage.completion_tokens == 8


async def test_text_held_back_for_a_stop_string_appears_at_the_end() -> None:
    whole = text_of("hello", 6)
    engine, _ = mock_engine()
    async with engine:
        merged = await collect(engine, "hello", max_tokens=6, stop=(whole[4:6] + "!",))
    assert (merged.text, merged.finish_reason) == (whole, "length")


async def test_stop_strings_wait_for_min_tokens() -> None:
    whole = text_of("hello", 20)
    engine, _ = mock_engine()
    async with engine:
        merged = await collect(engine, "hello", max_tokens=9, min_tokens=9, stop=(whole[2],))
    assert len(merged.token_ids) == 9


async def test_the_end_token_is_counted_but_not_shown() -> None:
    engine, _ = mock_engine(choose=lambda context: ord("x") if len(context) < 4 else EOS)
    async with engine:
        merged = await collect(engine, "ab", max_tokens=9)
    assert (merged.text, merged.finish_reason, merged.token_ids) == ("xx", "stop", [120, 120, EOS])


async def test_leaving_the_loop_early_gives_the_pages_back_within_two_steps() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.005
    async with engine:
        async with aclosing(engine.generate("hello", SamplingParams(max_tokens=100))) as deltas:
            async for _ in deltas:
                break
        before = len(executor.plans)
        while engine.parts.scheduler.pool.used:
            await anyio.sleep(0.001)
        assert len(executor.plans) - before <= 2
        assert engine.active_requests == 0


async def test_an_abort_ends_the_stream_with_what_was_made() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.005
    async with engine:
        stream = await engine.submit("hello", SamplingParams(max_tokens=100, n=2))
        await stream.receive()
        engine.abort(*stream.request_ids, "unknown")
        merged = Delta()
        async for delta in stream:
            merged.merge(delta)
    assert merged.finish_reason == "abort"
    assert merged.usage is not None
    assert merged.usage.completion_tokens >= 1


async def test_a_request_can_be_aborted_while_it_waits() -> None:
    engine, executor = mock_engine(max_running=1)
    executor.delay = 0.005
    async with engine:
        first = await engine.submit("first", SamplingParams(max_tokens=8))
        second = await engine.submit("second", SamplingParams(max_tokens=8))
        engine.abort(*second.request_ids)
        assert [d.finish_reason async for d in second] == ["abort"]
        assert "".join([d.text async for d in first]) == text_of("first", 8)


async def test_a_full_queue_refuses_and_the_rest_is_served() -> None:
    engine, executor = mock_engine(max_running=1, max_waiting=2)
    executor.delay = 0.002
    async with engine:
        streams = [await engine.submit("hello", SamplingParams(max_tokens=4)) for _ in range(2)]
        with pytest.raises(Overloaded):
            await engine.submit("hello", SamplingParams(n=2))
        for stream in streams:
            assert "".join([d.text async for d in stream]) == text_of("hello", 4)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ("", {}, "prompt"),
        ([257], {}, "prompt"),
        ([-1], {}, "prompt"),
        ("x" * 200, {}, "prompt"),
        ("\ud800", {}, "prompt"),
        ("x", {"max_tokens": 200}, "max_tokens"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ("x", {"temperature": -0.1}, "temperature"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_p": 1.1}, "top_p"),
        ("x", {"top_k": -2}, "top_k"),
        ("x", {"min_p": 2.0}, "min_p"),
        ("x", {"repetition_penalty": 0.0}, "repetition_penalty"),
        ("x", {"presence_penalty": 3.0}, "presence_penalty"),
        ("x", {"frequency_penalty": -3.0}, "frequency_penalty"),
        ("x", {"n": 0}, "n"),
        ("x", {"seed": 2**64}, "seed"),
        ("x", {"logprobs": 21}, "logprobs"),
        ("x", {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("x", {"logit_bias": {257: 1.0}}, "logit_bias"),
        ("x", {"logit_bias": {1: 101.0}}, "logit_bias"),
        ("x", {"stop_token_ids": (300,)}, "stop_token_ids"),
        ("x", {"stop": ("",)}, "stop"),
        ("x", {"stop": tuple("abcdefghijklmnopq")}, "stop"),
    ],
)
async def test_what_can_never_be_served_is_refused_by_name(
    prompt: str | list[int], params: dict[str, object], param: str
) -> None:
    engine, _ = mock_engine()
    async with engine:
        with pytest.raises(InvalidRequest) as error:
            await engine.submit(prompt, SamplingParams(**params))  # type: ignore[arg-type]
        assert error.value.param == param
        assert engine.active_requests == 0


async def test_request_ids_are_unique_while_in_use() -> None:
    engine, executor = mock_engine()
    executor.delay = 0.01
    async with engine:
        await engine.submit("hello", request_id="a")
        with pytest.raises(InvalidRequest, match="in use"):
            await engine.submit("hello", request_id="a")


async def test_chat_uses_the_template_and_base_models_refuse() -> None:
    engine, _ = mock_engine()
    async with engine:
        messages = [{"role": "user", "content": "hi"}]
        text = "".join([d.text async for d in engine.chat(messages, SamplingParams(max_tokens=4))])
    assert text == text_of("<user>hi\n<assistant>", 4)
    base, _ = mock_engine(chat_template=None)
    async with base:
        with pytest.raises(InvalidRequest, match="no chat template"):
            base.render_chat(messages)


async def test_long_texts_are_tokenized_like_short_ones() -> None:
    engine, _ = mock_engine()
    async with engine:
        text = "ab" * 10_000
        assert await engine.encode(text) == list(text.encode())


async def test_listeners_see_every_step_and_request() -> None:
    engine, executor = mock_engine()
    recorder = Recorder()
    engine.add_listener(recorder)
    async with engine:
        await collect(engine, "hello there", max_tokens=5)
    assert len(recorder.steps) == len(executor.plans) == 5
    first, second = recorder.steps[:2]
    assert (first.prefill_tokens, first.decode_rows) == (11, 0)
    assert (second.prefill_tokens, second.decode_rows) == (0, 1)
    assert {"plan", "fill", "forward", "sample", "commit", "stream"} <= set(first.seconds)
    assert [d.kind for d in first.decisions] == ["admit"]
    (request,) = recorder.requests
    assert (request.prompt_tokens, request.completion_tokens) == (11, 5)
    assert request.first_token is not None
    assert request.arrival <= request.first_token <= request.finished


async def test_an_engine_has_to_be_entered() -> None:
    engine, _ = mock_engine()
    assert (engine.health(), engine.active_requests) == ("loading", 0)
    with pytest.raises(EngineFailed, match="async with"):
        await engine.submit("hello")


async def test_an_idle_engine_takes_no_steps() -> None:
    engine, executor = mock_engine()
    async with engine:
        await collect(engine, "hello", max_tokens=2)
        await anyio.sleep(0.05)
        assert len(executor.plans) == 2


async def test_a_slow_reader_gets_everything_and_holds_nobody() -> None:
    engine, _ = mock_engine()
    async with engine:
        slow = await engine.submit("slow", SamplingParams(max_tokens=30))
        assert (await collect(engine, "fast", max_tokens=30)).text == text_of("fast", 30)
        deltas = await slow.receive()
        while deltas[-1].finish_reason is None:
            deltas += await slow.receive()
        assert "".join(d.text for d in deltas) == text_of("slow", 30)
        assert len(deltas) < 30


async def test_the_deadline_of_a_request_that_is_set_aside_passes_too() -> None:
    """Though nothing runs that would notice."""
    engine, _ = mock_engine()
    async with engine:
        stream = await engine.submit("hi", SamplingParams(max_tokens=9), terms=Terms(deadline=0.3))
        engine.pause(*stream.request_ids)
        with anyio.fail_after(3), pytest.raises(DeadlineExceeded):
            await stream.receive()


async def test_a_request_that_waits_says_where_it_stands() -> None:
    engine, executor = mock_engine(max_running=1)
    executor.delay = 0.01
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    async with engine:
        streams = [await engine.submit("hi", params, request_id=f"r{n}") for n in range(3)]
        while engine.queue_progress("r0") is not None:
            await anyio.sleep(0.005)
        found = [engine.queue_progress(f"r{n}") for n in (1, 2)]
        assert [progress.position for progress in found if progress] == [0, 1]
        assert found[1] is not None
        assert found[1].seconds > 0
        assert found[1].reason
        assert engine.queue_progress("unknown") is None
        left = engine.allowance("")
        assert left.requests_left == left.requests - 2
        for stream in streams:
            engine.abort(*stream.request_ids)
