"""Responses that call the operator's servers, through OpenAI's client."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.bridge.asking import TOOL, WEATHER, ask
from tests.server.bridge.test_servers import OtherServer
from tests.server.collector import Collector
from tests.server.process import ServerProcess


def test_a_call_is_made_and_the_model_goes_on(client: openai.OpenAI) -> None:
    made = ask(client)
    listed, call, message = made.output
    assert (listed.type, listed.server_label) == ("mcp_list_tools", "it")
    assert [tool.name for tool in listed.tools] == ["weather"]
    assert (call.type, call.name, call.error) == ("mcp_call", "weather", None)
    assert call.output == f"It rains in {json.loads(call.arguments)['city']}."
    assert (message.type, made.status) == ("message", "incomplete")  # letters up to its limit
    assert made.usage.output_tokens == 200  # of both turns
    goes_on = client.responses.create(
        model="mock", previous_response_id=made.id, input="and?", max_output_tokens=16
    )
    assert goes_on.usage.input_tokens > len(call.output) + len(message.content[0].text)


def test_its_events_tell_of_every_step(client: openai.OpenAI) -> None:
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    order = [
        "response.created",
        "response.mcp_list_tools.in_progress",
        "response.mcp_list_tools.completed",
        "response.mcp_call.in_progress",
        "response.mcp_call_arguments.delta",
        "response.mcp_call_arguments.done",
        "response.mcp_call.completed",
        "response.output_text.delta",
        "response.incomplete",
    ]
    assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
    deltas = [e.delta for e in events if e.type == "response.mcp_call_arguments.delta"]
    done = next(e for e in events if e.type == "response.mcp_call_arguments.done")
    assert "".join(deltas) == done.arguments


def test_openais_client_puts_the_stream_together(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required"}
    with client.responses.stream(
        model="mock", input="hi", parallel_tool_calls=False, max_output_tokens=200, **options
    ) as stream:
        kinds = {event.type for event in stream}
    assert "response.mcp_call.completed" in kinds


def test_all_turns_share_the_tokens_of_an_answer(client: openai.OpenAI) -> None:
    made = ask(client, max_output_tokens=150)
    assert made.usage.output_tokens == 150
    assert made.incomplete_details.reason == "max_output_tokens"


def test_a_server_is_named_once(server: ServerProcess) -> None:
    body = {"model": "mock", "input": "hi", "tools": [TOOL, TOOL]}
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)
    assert response.json()["error"]["param"] == "tools.[1].server_label"


@pytest.mark.parametrize(
    ("tool", "error"),
    [("fail", "it broke"), ("hang", "did not answer within 5 seconds"), ("huge", "more than")],
)
def test_what_goes_wrong_is_told_to_the_model_and_the_client(
    client: openai.OpenAI, tool: str, error: str
) -> None:
    made = ask(client, tools=[TOOL | {"allowed_tools": [tool]}])
    call = made.output[1]
    assert call.output is None
    assert error in call.error
    assert call.status == "failed"
    assert made.output[2].type == "message"


def test_calls_are_counted(client: openai.OpenAI) -> None:
    made = ask(client, parallel_tool_calls=True, max_tool_calls=1, max_output_tokens=400)
    calls = [item for item in made.output if item.type == "mcp_call"]
    assert calls[0].error is None
    assert all("max_tool_calls" in (call.error or "") for call in calls[1:])


def test_a_response_is_cancelled_while_a_tool_runs(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    made = ask(client, tools=[TOOL | {"allowed_tools": ["hang"]}], background=True)
    for _ in range(200):
        found = client.responses.retrieve(made.id)
        if len(found.output) > 1 and found.output[1].status == "calling":
            break
        time.sleep(0.01)
    begin = time.monotonic()
    assert client.responses.cancel(made.id).status == "cancelled"
    assert time.monotonic() - begin < 1
    assert server.idle(2)


def test_the_prompts_pages_are_kept_while_a_tool_runs(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    prompt = "words " * 100
    made = ask(client, input=prompt, tools=[TOOL | {"allowed_tools": ["hang"]}], background=True)
    kept = 0.0
    while client.responses.retrieve(made.id).status in ("queued", "in_progress"):
        kept = max(kept, server.metric("ryzanstein_kv_pages_kept"))
    assert kept >= len(prompt) // 16
    with client.responses.retrieve(made.id, stream=True) as events:
        list(events)
    assert client.responses.retrieve(made.id).usage.input_tokens_details.cached_tokens > len(prompt)
    assert server.metric("ryzanstein_kv_pages_kept") == 0, "it has ended"


@pytest.mark.parametrize(
    ("changes", "param", "status"),
    [
        ({"server_url": "http://169.254.169.254/mcp"}, "tools.[0].server_url", 400),
        ({"headers": {"a": "b"}}, "tools.[0].headers", 400),
        ({"server_label": "other"}, "tools.[0].server_label", 400),
        ({"require_approval": "sometimes"}, "tools.[0].require_approval", 400),
        (
            {"require_approval": {"never": {"read_only": True}}},
            "tools.[0].require_approval.never",
            400,
        ),
        ({"allowed_tools": ["dance"]}, "tools.[0].allowed_tools", 400),
        ({"allowed_tools": {"read_only": True}}, "tools.[0].allowed_tools", 400),
        ({"allowed_tools": [{}]}, "tools.[0].allowed_tools", 400),
        ({"server_label": "gone"}, "tools.[0]", 424),
    ],
    ids=str,
)
def test_what_is_not_taken_is_refused_by_place(
    server: ServerProcess, changes: dict[str, Any], param: str, status: int
) -> None:
    body = {"model": "mock", "input": "hi", "tools": [TOOL | changes]}
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_call_is_a_span_of_its_answers_trace(tmp_path: Path) -> None:
    collector = Collector()
    with OtherServer() as other:
        file = tmp_path / "mcp.toml"
        file.write_text(f'[servers.it]\nurl = "{other.url}/mcp"\n')
        env = {
            "MOCK_ENGINE": json.dumps({"pages": 2048, "page_size": 16, "context": 8000}),
            "MOCK_SERVER": json.dumps({"mcp_file": str(file)}),
            "MOCK_TRACING": json.dumps({"endpoint": collector.endpoint, "sample_ratio": 1.0}),
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with (
            ServerProcess(module="tests.server.mock_server", env=env) as traced,
            openai.OpenAI(base_url=f"{traced.url}/v1", api_key="none") as client,
        ):
            made = client.responses.with_raw_response.create(
                model="mock", input="hi", tools=[WEATHER], tool_choice="required",  # type: ignore[list-item]
                parallel_tool_calls=False, max_output_tokens=120,
            )  # fmt: skip
    spans = {span.name: span for span in collector.of(made.headers["x-trace-id"])}
    collector.close()
    call = spans["execute_tool weather"]
    turn = spans["chat mock"]  # the last of two
    assert call.end_time_unix_nano <= turn.start_time_unix_nano + 50_000_000
    assert {a.key: a.value.string_value for a in call.attributes}["ryzanstein.mcp_server"] == "it"


def test_a_server_without_any_says_where_they_are_named(roomy: ServerProcess) -> None:
    body = {"model": "mock", "input": "hi", "tools": [TOOL]}
    response = httpx.post(f"{roomy.url}/v1/responses", json=body)
    assert response.status_code == 400
    assert "server.mcp_file" in response.json()["error"]["message"]


def test_a_wrong_file_keeps_the_server_from_starting(tmp_path: Path) -> None:
    file = tmp_path / "mcp.toml"
    file.write_text("[servers.a]\n")
    env = {"MOCK_SERVER": json.dumps({"mcp_file": str(file)})}
    with (
        pytest.raises(AssertionError, match="either a url or a command"),
        ServerProcess(module="tests.server.mock_server", env=env),
    ):
        pass


def test_a_drain_waits_for_the_turns_that_are_left(tmp_path: Path) -> None:
    """SIGTERM comes while a tool hangs; its answer still has its second turn."""
    env = {
        "MOCK_ENGINE": json.dumps({"pages": 2048, "page_size": 16, "context": 8000}),
        "MOCK_SERVER": json.dumps({"mcp_file": str(tmp_path / "mcp.toml")}),
    }
    with OtherServer() as other:
        (tmp_path / "mcp.toml").write_text(
            f'[servers.it]\nurl = "{other.url}/mcp"\ntimeout_seconds = 5\n'
        )
        with (
            ServerProcess(module="tests.server.mock_server", env=env) as own,
            openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0) as client,
        ):
            hang = TOOL | {"allowed_tools": ["hang"]}
            kinds = []
            for event in ask(client, stream=True, tools=[hang]):
                kinds.append(event.type)
                if event.type == "response.mcp_call.in_progress":
                    own.terminate()
                    while httpx.get(f"{own.url}/health/ready").status_code == 200:
                        time.sleep(0.01)
                    with pytest.raises(openai.InternalServerError, match="shutting down"):
                        ask(client)
            assert "response.mcp_call.failed" in kinds
            assert "response.output_text.delta" in kinds
            assert kinds[-1] == "response.incomplete"
            assert own.wait() == 0
