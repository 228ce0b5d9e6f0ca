"""Anthropic's Messages API, by its own client and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

HELLO: Any = [{"role": "user", "content": "hi"}]


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<{role}>{text}\n" for role, text in turns) + "<assistant>"


@pytest.fixture(scope="module")
def client(mock: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=mock.url, api_key="x", max_retries=0) as client:
        yield client


def test_a_message(client: anthropic.Anthropic) -> None:
    blocks: Any = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    message = client.messages.create(
        model="mock",
        max_tokens=8,
        system="be brief",
        messages=[{"role": "user", "content": blocks}],
        metadata={"user_id": "u"},
    )
    prompt = chat(("system", "be brief"), ("user", "hi"))
    assert message.content[0].text == text_of(prompt, 8)  # type: ignore[union-attr]
    assert (message.stop_reason, message.role, message.type) == (
        "max_tokens",
        "assistant",
        "message",
    )
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(prompt)
    assert usage.output_tokens == 8


def test_a_streamed_message(client: anthropic.Anthropic) -> None:
    expected = text_of(chat(("user", "hi")), 8)
    with client.messages.stream(model="mock", max_tokens=8, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.content[0].text == expected  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 8)
    kinds = [
        event.type
        for event in client.messages.create(model="mock", max_tokens=3, messages=HELLO, stream=True)
    ]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    text = text_of(chat(("user", "hi")), 20)
    stop = text[4:6]
    message = client.messages.create(
        model="mock", max_tokens=50, messages=HELLO, stop_sequences=[stop]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]


def test_the_assistants_beginning_is_gone_on_with(client: anthropic.Anthropic) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well,"}]
    message = client.messages.create(model="mock", max_tokens=5, messages=messages)
    assert message.content[0].text == text_of("<user>hi\n<assistant>Well,", 5)  # type: ignore[union-attr]


def test_tokens_are_counted_and_models_listed(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="mock", system="be brief", messages=HELLO)
    assert count.input_tokens == len(chat(("system", "be brief"), ("user", "hi")))
    (model,) = client.models.list()
    assert (model.id, model.display_name) == ("mock", "mock")


def test_errors_have_anthropics_shape(client: anthropic.Anthropic, mock: ServerProcess) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=1, messages=HELLO)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="only text"):
        client.messages.create(model="mock", max_tokens=1, messages=image)
    tool: Any = [{"name": "f", "input_schema": {"type": "object"}}]
    with pytest.raises(anthropic.BadRequestError, match="tools is not supported"):
        client.messages.create(model="mock", max_tokens=1, messages=HELLO, tools=tool)
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        client.messages.create(model="mock", max_tokens=2048, messages=HELLO, thinking=thinking)
    missing = httpx.post(f"{mock.url}/v1/messages", json={"model": "mock", "messages": HELLO})
    assert missing.status_code == 400
    assert missing.json()["type"] == "error"
    assert missing.json()["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in missing.json()["error"]["message"]


def test_keys_come_anthropics_way(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["secret"]})
    right = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)
    assert right.messages.create(model="mock", max_tokens=1, messages=HELLO)
    wrong = anthropic.Anthropic(base_url=server.url, api_key="guess", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model="mock", max_tokens=1, messages=HELLO)
    right.close()
    wrong.close()


def test_a_failure_midway_is_an_error_event(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.02, pages=128, context=250)
    client = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
    stream = client.messages.create(model="mock", max_tokens=200, messages=HELLO, stream=True)
    next(iter(stream))
    httpx.post(f"{server.url}/test/fail")
    with pytest.raises(anthropic.APIStatusError, match="step failed"):
        list(stream)
    client.close()
