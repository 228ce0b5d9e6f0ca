"""LiteLLM, which many gateways and agents are made of."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing it asks the network
pytest.importorskip("litellm", reason="pip install -e '.[clients]'")

import litellm

from tests.mock import continuation
from tests.server.process import ServerProcess

MESSAGES = [{"role": "user", "content": "hi"}]
EXPECTED = bytes(continuation(list(b"<user>hi\n<assistant>"), 8)).decode()


@pytest.fixture
def options(mock: ServerProcess) -> dict[str, Any]:
    return {
        "model": "openai/mock",
        "api_base": f"{mock.url}/v1",
        "api_key": "none",
        "max_tokens": 8,
    }


def test_a_chat_completion(options: dict[str, Any]) -> None:
    answer = litellm.completion(messages=MESSAGES, **options)
    assert answer.choices[0].message.content == EXPECTED
    assert answer.usage.completion_tokens == 8


async def test_streams(options: dict[str, Any]) -> None:
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **options)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == EXPECTED


def test_a_text_completion(options: dict[str, Any]) -> None:
    options["model"] = "text-completion-openai/mock"
    answer = litellm.text_completion(prompt="ab", **options)
    assert answer.choices[0].text == bytes(continuation([97, 98], 8)).decode()


def test_anthropics_way(mock: ServerProcess) -> None:
    answer = litellm.completion(
        model="anthropic/mock",
        api_base=mock.url,
        api_key="none",
        messages=MESSAGES,
        max_tokens=8,
    )
    assert answer.choices[0].message.content == EXPECTED


def test_the_responses_api(options: dict[str, Any]) -> None:
    del options["max_tokens"]
    answer = litellm.responses(input="hi", max_output_tokens=20, **options)
    expected = bytes(continuation(list(b"<user>hi\n<assistant>"), 20)).decode()
    assert answer.output[0].content[0].text == expected


def test_errors_are_what_litellm_knows(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **options | {"model": "openai/other"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=MESSAGES, temperature=1.9, top_p=5, **options)
