"""Responses that outlive their connections, without a network between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

from engine import AsyncEngine, SamplingParams
from engine.config import ServerSection
from server.errors import HTTPError
from server.log import Event
from server.response_composer import ResponseComposer
from server.store import Record, Store
from tests.mock import mock_engine

PROMPT = [97, 98]


@asynccontextmanager
async def opened(**settings: Any) -> AsyncIterator[tuple[AsyncEngine, Store]]:
    engine, _ = mock_engine(pages=512, context=400)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(engine)
        store = Store(engine, ServerSection(**settings))
        await stack.enter_async_context(store.open())
        yield engine, store


async def begin(
    engine: AsyncEngine, store: Store, name: str, tokens: int = 300, /, **options: Any
) -> Record:
    composer = ResponseComposer(name, {}, engine.parts.tokenizer, logprobs=False)
    owner = options.pop("owner", "owner")
    record = Record(name, owner, composer, **{"resumable": True, "settings": object()} | options)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    store.start(record, await engine.submit(PROMPT, params, request_id=name))
    return record


class NoMore:
    """The turns of a response that has one."""

    calls = 0

    async def next(self, request_id: str, tell: Callable[[list[Event]], None]) -> None:
        """Nothing follows."""

    def cut(self) -> None:
        """Nothing is cut."""


async def test_what_ended_last_is_kept_however_early_it_began() -> None:
    async with opened(stored_responses=2) as (engine, store):
        slow = await begin(engine, store, "slow", 200, background=True)
        for name in ("a", "b"):
            await (await begin(engine, store, name, 2, background=True)).ended.wait()
        await slow.ended.wait()
        assert store.find("slow", "owner") is slow
        with pytest.raises(HTTPError):
            store.find("a", "owner")


async def test_who_keeps_many_loses_its_own() -> None:
    async with opened(stored_responses=3) as (engine, store):
        for name, owner in (("first", "a"), ("second", "b"), ("third", "b"), ("fourth", "b")):
            record = await begin(engine, store, name, 2, background=True, owner=owner)
            await record.ended.wait()
        assert store.find("first", "a").is_over
        assert store.find("fourth", "b").is_over
        with pytest.raises(HTTPError):
            store.find("second", "b")


async def test_a_slow_but_steady_reader_is_no_stalled_one() -> None:
    async with opened(slow_consumer_seconds=0.2) as (engine, store):
        record = await begin(engine, store, "r", 150)
        cursor = store.read(record)
        events = 0
        while await cursor.next() is not None:
            events += 1
            await anyio.sleep(0.02 if events < 100 else 0)
        assert record.composer.status == "incomplete"
        assert len(record.composer.text) == 150


async def test_what_is_complete_cannot_be_read_too_slowly() -> None:
    async with opened(slow_consumer_seconds=0.1) as (engine, store):
        record = await begin(engine, store, "r", 60)
        cursor = store.read(record)
        await anyio.sleep(0.5)
        while await cursor.next() is not None:
            pass
        assert (record.composer.status, len(record.composer.text)) == ("incomplete", 60)


async def test_a_wrong_place_to_read_on_from_changes_nothing() -> None:
    async with opened(resume_ttl_seconds=0.3) as (engine, store):
        record = await begin(engine, store, "r")
        store.leave(record, store.read(record))
        for after in (-2, 10**6):
            with pytest.raises(HTTPError):
                store.read(record, after)
        with anyio.fail_after(2):
            await record.ended.wait()
        assert record.composer.status in ("cancelled", "incomplete")


async def test_every_drop_has_its_own_time() -> None:
    async with opened(resume_ttl_seconds=0.5) as (engine, store):
        record = await begin(engine, store, "r", 390)
        store.pause(record)
        store.leave(record, store.read(record))
        await anyio.sleep(0.4)
        store.leave(record, store.read(record))
        await anyio.sleep(0.3)
        assert not record.is_over, "the first drop's time has passed, not the second's"
        await anyio.sleep(0.4)
        assert record.is_over


async def test_only_so_many_may_be_set_aside() -> None:
    async with opened(max_streams=3) as (engine, store):
        records = [await begin(engine, store, f"r{n}") for n in range(4)]
        for record in records[:3]:
            store.pause(record)
        with pytest.raises(HTTPError) as caught:
            store.pause(records[3])
        assert caught.value.status == 429
        for record in records:
            store.cancel(record)


async def test_a_background_response_that_is_set_aside_is_given_up() -> None:
    async with opened(resume_ttl_seconds=0.2) as (engine, store):
        record = await begin(engine, store, "r", background=True)
        cursor = store.read(record)
        store.pause(record)
        store.leave(record, cursor)
        with anyio.fail_after(2):
            await record.ended.wait()


async def test_going_on_does_not_outrun_a_reader_who_has_stalled() -> None:
    async with opened() as (engine, store):
        record = await begin(engine, store, "r", 390)
        cursor = store.read(record)
        while not record.held:
            await anyio.sleep(0.01)
        store.pause(record)
        store.proceed(record)
        await anyio.sleep(0.3)
        assert engine.active_requests == 1
        while await cursor.next() is not None:
            pass
        assert len(record.composer.text) == 390


@pytest.mark.parametrize("calls", [False, True], ids=["one turn", "turns"])
async def test_a_drain_does_not_wait_for_what_is_set_aside(calls: bool) -> None:
    async with opened() as (engine, store):
        record = await begin(engine, store, "r", rounds=NoMore() if calls else None)
        store.pause(record)
        await anyio.sleep(0.05)
        with anyio.fail_after(2):
            await engine.drain(30)
        await record.ended.wait()


async def test_whose_answers_are_large_loses_those_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.store.KEPT_BYTES", 20_000)
    async with opened() as (engine, store):
        for number in range(4):
            record = await begin(engine, store, f"small {number}", 2, background=True, owner="a")
            await record.ended.wait()
        for number in range(3):
            record = await begin(engine, store, f"large {number}", 300, background=True, owner="b")
            await record.ended.wait()
        assert all(store.find(f"small {number}", "a") for number in range(4))
        with pytest.raises(HTTPError):
            store.find("large 0", "b")
