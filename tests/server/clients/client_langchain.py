"""LangChain's own suite for chat models, on `langchain-openai`: text with the mock, whose answers
are known; tools and forms with SmolLM2, which is made to call them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="pip install -e '.[clients]'")

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.server.process import ServerProcess


class TestChatOpenAI(ChatModelIntegrationTests):
    """Every test of the suite that a model of text alone has to pass."""

    url = ""

    @pytest.fixture(autouse=True)
    def _server(self, mock: ServerProcess) -> None:
        type(self).url = f"{mock.url}/v1"

    @pytest.fixture
    def model(self, _server: None) -> ChatOpenAI:
        return ChatOpenAI(**self.chat_model_params)

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "mock",
            "base_url": self.url,
            "api_key": "none",
            "max_tokens": 12,
            "max_retries": 0,
            "stream_usage": True,
        }

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return False


class TestChatOpenAIResponses(TestChatOpenAI):
    """The same over the Responses API."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return super().chat_model_params | {"use_responses_api": True}


@pytest.fixture(scope="module")
def smollm2() -> Iterator[ServerProcess]:
    with ServerProcess("--set", "cache.tokens=16384") as server:
        yield server


class TestTools(ChatModelIntegrationTests):
    """A model of 135 million weights is made to call tools, and takes the likeliest tokens."""

    url = ""

    @pytest.fixture(autouse=True)
    def _server(self, smollm2: ServerProcess) -> None:
        type(self).url = f"{smollm2.url}/v1"

    @pytest.fixture
    def model(self, _server: None) -> ChatOpenAI:
        return ChatOpenAI(**self.chat_model_params)

    @pytest.mark.xfail(reason="nothing makes so small a model call a tool in an agent's loop")
    def test_agent_loop(self, model: ChatOpenAI) -> None:
        super().test_agent_loop(model)

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "smollm2-135m",
            "base_url": self.url,
            "api_key": "none",
            "max_tokens": 500,
            "temperature": 0,
            "max_retries": 0,
            "stream_usage": True,
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def tool_choice_value(self) -> str:
        return "required"

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return False


class TestForms(TestTools):
    """It fills in schemas; its jokes would repeat themselves for ever, were they the likeliest."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        drawn = {"temperature": 0.7, "seed": 3, "extra_body": {"repetition_penalty": 1.15}}
        return super().chat_model_params | drawn

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}
