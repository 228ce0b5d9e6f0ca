"""LangChain's own suite for chat models, on `langchain-openai`, as far as no tools are involved."""

from __future__ import annotations

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
