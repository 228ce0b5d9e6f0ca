"""A stream's readers: who waits, who is called, and what a slow one misses (nothing)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import anyio
import pytest

from engine.streams import Handout, TokenStream
from engine.types import Delta


def opened(choices: int = 1) -> TokenStream:
    stream = TokenStream()
    stream.join("r", choices)
    return stream


def said(text: str, *, index: int = 0, last: bool = False) -> Delta:
    return Delta(index=index, text=text, finish_reason="stop" if last else None)


async def turn() -> None:
    """Until callbacks that are due have run, and what they woke."""
    for _ in range(4):
        await asyncio.sleep(0)


class Reader:
    """What `pour` gave, and for which texts it has to wait first."""

    def __init__(self, *slow: str) -> None:
        self.texts: list[str] = []
        self.callers: list[object] = []
        self.gate = asyncio.Event()
        self._slow = slow

    def take(self, deltas: list[Delta]) -> Awaitable[None] | None:
        text = "".join(delta.text for delta in deltas)
        if text == "broken":
            raise ValueError(text)
        self.texts.append(text)
        self.callers.append(asyncio.current_task())
        return self._open() if text in self._slow else None

    async def _open(self) -> None:
        await self.gate.wait()


async def test_pour_is_called_back_without_its_task() -> None:
    stream, reader, handout = opened(), Reader(), Handout()
    task = asyncio.create_task(stream.pour(reader.take))
    handout.push(stream, said("a"))
    await turn()
    handout.push(stream, said("b"))
    handout.push(stream, said("c"))
    assert reader.texts == ["a"], "nobody is called before the engine's turn is over"
    await turn()
    assert reader.texts == ["a", "bc"]
    assert reader.callers == [task, None], "the first was there before its task waited"
    handout.push(stream, said("d", last=True))
    await task
    assert reader.texts == ["a", "bc", "d"]


async def test_pour_ends_only_with_the_last_choice() -> None:
    stream, reader, handout = opened(2), Reader(), Handout()
    task = asyncio.create_task(stream.pour(reader.take))
    await turn()
    handout.push(stream, said("a", last=True))
    await turn()
    assert reader.texts == ["a"]
    handout.push(stream, said("b", index=1))
    handout.push(stream, said("c", index=1, last=True))
    await task
    assert reader.texts == ["a", "bc"]


async def test_what_comes_while_a_reader_is_slow_comes_together() -> None:
    stream, reader, handout = opened(), Reader("a", "bc"), Handout()
    task = asyncio.create_task(stream.pour(reader.take))
    await turn()
    handout.push(stream, said("a"))
    await turn()
    for text in "bc":
        handout.push(stream, said(text))
        await turn()
    assert reader.texts == ["a"]
    reader.gate.set()
    await turn()
    handout.push(stream, said("d"))
    await turn()
    assert reader.texts == ["a", "bc", "d"]
    handout.push(stream, said("", last=True))
    await task


async def test_an_error_comes_behind_what_is_pending() -> None:
    stream, reader, handout = opened(), Reader(), Handout()
    task = asyncio.create_task(stream.pour(reader.take))
    await turn()
    handout.push(stream, said("a"))
    stream.fail(ValueError("lost"))
    with pytest.raises(ValueError, match="lost"):
        await task
    assert reader.texts == ["a"]


async def test_a_reader_that_fails_ends_its_own_stream_alone() -> None:
    first, second, handout = opened(), opened(), Handout()
    failing, other = Reader(), Reader()
    task = asyncio.create_task(first.pour(failing.take))
    beside = asyncio.create_task(second.pour(other.take))
    await turn()
    for stream in (first, second):
        handout.push(stream, said("broken" if stream is first else "a"))
    await turn()
    with pytest.raises(ValueError, match="broken"):
        await task
    handout.push(second, said("b", last=True))
    await beside
    assert other.texts == ["a", "b"]


async def test_a_reader_that_fails_is_given_nothing_more() -> None:
    stream, reader, handout = opened(), Reader(), Handout()
    task = asyncio.create_task(stream.pour(reader.take))
    await turn()
    handout.push(stream, said("broken"))
    stream.hand_out()
    handout.push(stream, said("later", last=True))
    with pytest.raises(ValueError, match="broken"):
        await task
    assert reader.texts == []


async def test_nothing_is_lost_when_pouring_is_given_up() -> None:
    stream, reader, handout = opened(), Reader(), Handout()
    with anyio.move_on_after(0.01):
        await stream.pour(reader.take)
    handout.push(stream, said("a"))
    await turn()
    assert reader.texts == []
    assert [delta.text for delta in await stream.receive()] == ["a"]
