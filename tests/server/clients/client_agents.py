"""OpenAI's agents SDK runs a loop: a tool is called, its result comes back, an answer is made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("agents", reason="pip install -e '.[clients]'")

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from tests.server.process import ServerProcess

set_tracing_disabled(True)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[ServerProcess]:
    with ServerProcess("--set", "cache.tokens=16384") as server:
        yield server


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_tool_loop_runs_to_its_answer(
    smollm2: ServerProcess,
    kind: type[OpenAIChatCompletionsModel] | type[OpenAIResponsesModel],
    streamed: bool,
) -> None:
    asked: list[str] = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "It is sunny, 21 degrees."

    async with AsyncOpenAI(base_url=f"{smollm2.url}/v1", api_key="none") as client:
        # The first turn has to call; then the SDK takes the compulsion away.
        agent = Agent(
            name="weather",
            instructions="Answer questions about the weather.",
            model=kind(model="smollm2-135m", openai_client=client),
            model_settings=ModelSettings(
                tool_choice="required", temperature=0, max_tokens=120, parallel_tool_calls=False
            ),
            tools=[get_weather],
        )
        question = "What is the weather in Paris?"
        if streamed:
            result = Runner.run_streamed(agent, question, max_turns=3)
            events = [event.type async for event in result.stream_events()]
            assert "raw_response_event" in events
        else:
            result = await Runner.run(agent, question, max_turns=3)
    assert asked == ["Paris"]
    assert isinstance(result.final_output, str)
    assert result.final_output
