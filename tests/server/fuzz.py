"""Mutated bodies and messages against a real server: `python -m tests.server.fuzz --count N`.

Whatever comes, the server answers with what was wrong or with what was asked for, never with an
error of its own, and nothing of it stays behind: no task, no page, no descriptor.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import anyio
import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.server.process import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "hi"}]
ITEMS: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "mock", "messages": MESSAGES, "max_tokens": 3}),
    (
        "/v1/chat/completions",
        {
            "model": "mock",
            "messages": MESSAGES,
            "max_tokens": 3,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
            "stop": ["x"],
            "stream_options": {"include_usage": True},
            "logit_bias": {"97": 1},
        },
    ),
    (
        "/v1/completions",
        {"model": "mock", "prompt": ["ab", "cd"], "max_tokens": 3, "echo": True, "logprobs": 1},
    ),
    ("/v1/responses", {"model": "mock", "input": ITEMS, "max_output_tokens": 3, "stream": True}),
    ("/v1/responses", {"model": "mock", "input": "hi", "max_output_tokens": 3, "metadata": {}}),
    (
        "/v1/messages",
        {"model": "mock", "max_tokens": 3, "messages": MESSAGES, "system": "x", "stream": True},
    ),
    ("/v1/messages/count_tokens", {"model": "mock", "messages": MESSAGES}),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [97, 98]}),
]
SOCKET: list[dict[str, Any]] = [
    {"type": "response.create", "input": "hi", "max_output_tokens": 3, "stream_id": "a"},
    {"type": "response.create", "input": ITEMS, "max_output_tokens": 3, "generate": False},
    {
        "type": "chat.completion.create",
        "stream_id": "b",
        "request": {"messages": MESSAGES, "max_tokens": 3},
    },
    {"type": "response.cancel", "response_id": "resp_1"},
    {"type": "response.resume", "response_id": "resp_1", "starting_after": 3},
    {"type": "response.steer", "previous_response_id": "resp_1", "input": "more"},
    {"type": "response.pause", "response_id": "resp_1"},
    {"type": "flow.credit", "stream_id": "a", "events": 5},
]
# Bad UTF-8 and messages that are too big.
CLOSES = (1000, 1007, 1009)
NAMES = ("n", "seed", "stop", "top_p", "min_tokens", "tools", "store", "x")
JUNK: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**70, 1e308, -0.5, 0.5, "", "x", "\ud800", "\x00"),
    *("é" * 50, "x" * 3000, [], {}, [[]], [None], {"": None}, {"type": "text"}, [{}], "NaN"),
    *("<eos>", ["a", 1], [97], [[97]], [-1], [10**9]),
]


def mutated(chance: random.Random, body: dict[str, Any]) -> bytes:
    """A body with some of its values, names or bytes changed."""
    changed = json.loads(json.dumps(body))
    for _ in range(chance.choice([1, 1, 2, 4])):
        _mutate(chance, changed)
    data = bytearray(json.dumps(changed).encode())
    if chance.random() < 0.3:
        for _ in range(chance.choice([1, 2, 8])):
            place = chance.randrange(len(data) + 1)
            how = chance.random()
            if how < 0.4 and place < len(data):
                data[place] = chance.randrange(256)
            elif how < 0.7:
                data[place:place] = bytes([chance.choice(b'{}[]",:0x\\\xff')])
            else:
                del data[place : place + chance.randrange(1, 9)]
    return bytes(data)


def _mutate(chance: random.Random, value: Any) -> None:
    """Change something somewhere in a container."""
    if isinstance(value, dict) and value:
        key = chance.choice([*value])
        how = chance.random()
        if how < 0.4 and isinstance(value[key], (dict, list)) and value[key]:
            _mutate(chance, value[key])
        elif how < 0.75:
            value[key] = copy.deepcopy(chance.choice(JUNK))
        elif how < 0.85:
            del value[key]
        else:
            name = chance.choice(
                ["n", "seed", "stop", "top_p", "min_tokens", "tools", "store", "x"]
            )
            value[name] = copy.deepcopy(chance.choice(JUNK))
    elif isinstance(value, list) and value:
        place = chance.randrange(len(value))
        if isinstance(value[place], (dict, list)) and value[place] and chance.random() < 0.7:
            _mutate(chance, value[place])
        else:
            value[place] = copy.deepcopy(chance.choice(JUNK))


async def requests(
    server: ServerProcess, chance: random.Random, count: int, seen: Counter[str]
) -> None:
    """Mutated bodies over HTTP, one after another."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        for _ in range(count):
            path, body = chance.choice(BODIES)
            data = mutated(chance, body)
            headers = {"content-type": "application/json"}
            response = await http.post(path, content=data, headers=headers)
            seen[str(response.status_code)] += 1
            assert response.status_code < 500, (path, data, response.text)


async def messages(
    server: ServerProcess, chance: random.Random, count: int, seen: Counter[str]
) -> None:
    """Mutated messages, many on a connection, which then ends or is cut."""
    url = f"ws://127.0.0.1:{server.port}/v1/responses"
    while count > 0:
        batch = min(count, chance.randint(1, 40))
        count -= batch
        protocols: Any = ["ryzanstein.v1"] if chance.random() < 0.8 else None
        async with connect(url, subprotocols=protocols, max_size=None) as socket:
            try:
                for _ in range(batch):
                    data = mutated(chance, chance.choice(SOCKET))
                    await socket.send(data.decode("utf-8", "replace"))
                with anyio.move_on_after(chance.choice([0.0, 0.05, 0.3])):
                    while True:
                        event = json.loads(await socket.recv())
                        seen[event["type"] + str(event.get("status", ""))] += 1
                        assert event.get("status", 0) < 500, event
            except ConnectionClosed as closed:
                if closed.rcvd is None or closed.rcvd.code not in CLOSES:
                    raise AssertionError(f"the connection broke: {closed}") from closed
            if chance.random() < 0.5:
                socket.transport.abort()


async def fuzz(server: ServerProcess, count: int, seed: int, lanes: int = 8) -> Counter[str]:
    """`count` bodies and messages in all. Raises AssertionError."""
    seen: Counter[str] = Counter()
    async with anyio.create_task_group() as group:
        for lane in range(lanes):
            chance = random.Random(seed * 1000 + lane)
            share = count // lanes
            kind = requests if lane % 2 == 0 else messages
            group.start_soon(kind, server, chance, share, seen)
    return seen


def check_nothing_is_left(server: ServerProcess, before: tuple[int, int]) -> None:
    """Raises AssertionError if a page, a descriptor or a task stays behind."""
    assert server.idle(30), "something still runs"
    end = time.monotonic() + 15
    while (now := server.held()) > before and time.monotonic() < end:
        time.sleep(0.2)
    assert now[0] <= before[0] + 2, f"descriptors: {before[0]} before, {now[0]} after"
    assert now[1] <= before[1] + 2, f"tasks: {before[1]} before, {now[1]} after"


def serving() -> ServerProcess:
    """A server whose resumable streams are given up soon."""
    options = {"pages": 512, "context": 400, "max_waiting": 100_000}
    settings = {"resume_ttl_seconds": 0.5, "slow_consumer_seconds": 2.0, "max_body_bytes": 20_000}
    env = {"MOCK_ENGINE": json.dumps(options), "MOCK_SERVER": json.dumps(settings)}
    return ServerProcess(module="tests.server.mock_server", env=env)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.server.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    with serving() as server:
        before = server.held()
        start = time.perf_counter()
        try:
            seen = anyio.run(fuzz, server, arguments.count, arguments.seed)
            check_nothing_is_left(server, before)
        finally:
            print(server.log[-20_000:], file=sys.stderr)
    print(f"{arguments.count} hold, {time.perf_counter() - start:.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
