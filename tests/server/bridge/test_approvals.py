"""Calls that wait for the client's approval, through OpenAI's client and over a WebSocket."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from engine import InvalidRequest
from server.bridge.approvals import approvals_of, arguments_in, names_that_ask
from server.bridge.servers import RemoteTool
from server.response_composer import conversation
from tests.server.bridge.asking import ask
from tests.server.process import ServerProcess

ASKING: dict[str, Any] = {"type": "mcp", "server_label": "it", "allowed_tools": ["weather"]}


def said(request: Any, *, approve: bool, **more: Any) -> dict[str, Any]:
    answer = {"approval_request_id": request.id, "approve": approve}
    return {"type": "mcp_approval_response", **answer, **more}


def go_on(client: openai.OpenAI, made: Any, *answers: Any, **options: Any) -> Any:
    options = {"previous_response_id": made.id, "max_output_tokens": 30, **options}
    return client.responses.create(model="mock", input=list(answers), tools=[ASKING], **options)


@pytest.fixture
def asked(client: openai.OpenAI) -> Any:
    return ask(client, tools=[ASKING])


def test_a_call_waits_for_approval_unless_it_is_said_to_need_none(asked: Any) -> None:
    listed, request = asked.output
    assert (listed.type, request.type) == ("mcp_list_tools", "mcp_approval_request")
    assert (request.name, request.server_label) == ("weather", "it")
    assert request.id.startswith("mcpr_")
    assert asked.status == "completed"


def test_what_is_approved_is_called_before_the_model_goes_on(
    client: openai.OpenAI,
    asked: Any,
) -> None:
    request = asked.output[-1]
    made = go_on(client, asked, said(request, approve=True))
    _, call, message = made.output
    assert (call.type, call.approval_request_id, call.error) == ("mcp_call", request.id, None)
    assert call.output == f"It rains in {json.loads(request.arguments)['city']}."
    assert message.type == "message"
    plain = go_on(client, asked, {"role": "user", "content": "never mind"})
    assert made.usage.input_tokens > plain.usage.input_tokens + len(call.output)


def test_the_events_of_an_approved_call_are_those_of_any(
    client: openai.OpenAI,
    asked: Any,
) -> None:
    events = list(go_on(client, asked, said(asked.output[-1], approve=True), stream=True))
    kinds = [event.type for event in events]
    order = [
        "response.created",
        "response.mcp_list_tools.completed",
        "response.mcp_call.in_progress",
        "response.mcp_call_arguments.done",
        "response.mcp_call.completed",
        "response.output_text.delta",
        "response.incomplete",
    ]
    assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_request_is_told_once_it_is_whole(client: openai.OpenAI) -> None:
    events = list(ask(client, tools=[ASKING], stream=True))
    told = [e for e in events if getattr(getattr(e, "item", None), "type", "").endswith("request")]
    assert [e.type for e in told] == ["response.output_item.added", "response.output_item.done"]
    assert all(json.loads(e.item.arguments)["city"] for e in told)
    assert not [e for e in events if "arguments.delta" in e.type]


def test_a_refusal_is_told_to_the_model_and_nothing_is_called(
    client: openai.OpenAI,
    asked: Any,
) -> None:
    made = go_on(client, asked, said(asked.output[-1], approve=False, reason="too wet"))
    call = made.output[1]
    assert (call.output, call.error) == (None, "the user did not approve this call: too wet")
    assert made.output[2].type == "message"


def test_a_client_that_stores_nothing_sends_the_request_back(
    client: openai.OpenAI,
) -> None:
    first = ask(client, tools=[ASKING], store=False)
    request = first.output[-1]
    back = [{"role": "user", "content": "hi"}, *(i.model_dump() for i in first.output)]
    made = client.responses.create(
        model="mock",
        input=[*back, said(request, approve=True)],
        tools=[ASKING],
        store=False,
        max_output_tokens=30,
    )
    assert made.output[1].approval_request_id == request.id
    assert made.output[1].error is None


def test_approved_calls_count_like_others(client: openai.OpenAI, asked: Any) -> None:
    made = go_on(client, asked, said(asked.output[-1], approve=True), max_tool_calls=1)
    calls = [item for item in made.output if item.type == "mcp_call"]
    assert calls[0].error is None
    assert len(calls) == 1


def test_a_response_that_is_in_the_background_makes_its_calls_there(
    client: openai.OpenAI,
    asked: Any,
) -> None:
    made = go_on(client, asked, said(asked.output[-1], approve=True), background=True)
    assert made.status == "queued"
    with client.responses.retrieve(made.id, stream=True) as events:
        kinds = [event.type for event in events]
    assert "response.mcp_call.completed" in kinds
    assert kinds[-1] == "response.incomplete"


@pytest.mark.parametrize(
    ("answer", "param"),
    [
        ({"approval_request_id": "mcpr_none"}, "input.[0].approval_request_id"),
        ({"approval_request_id": 7}, "input.[0].approval_request_id"),
        ({"approve": "yes"}, "input.[0].approve"),
    ],
)
def test_an_answer_that_is_none_is_refused_by_place(
    server: ServerProcess,
    asked: Any,
    answer: dict[str, Any],
    param: str,
) -> None:
    body = {
        "model": "mock",
        "previous_response_id": asked.id,
        "input": [said(asked.output[-1], approve=True) | answer],
        "tools": [ASKING],
    }
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_the_tool_has_to_be_among_the_requests(
    server: ServerProcess,
    asked: Any,
) -> None:
    answer = said(asked.output[-1], approve=True)
    body = {"model": "mock", "previous_response_id": asked.id, "input": [answer]}
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_a_request_is_answered_once() -> None:
    request = {"type": "mcp_approval_request", "id": "a", "name": "f", "server_label": "it"}
    answer = {"type": "mcp_approval_response", "approval_request_id": "a", "approve": True}
    tool = RemoteTool("it", "f", "", {})
    (approval,) = approvals_of([answer], [request | {"arguments": "{}"}], [tool])
    assert approval.refusal is None
    with pytest.raises(InvalidRequest, match="answered twice"):
        approvals_of([answer, answer], [request | {"arguments": "{}"}], [tool])
    for arguments in ("[]", "{", None):
        with pytest.raises(InvalidRequest, match="an object of arguments"):
            approvals_of([answer], [request | {"arguments": arguments}], [tool])


@pytest.mark.parametrize(
    ("rule", "asking"),
    [
        (None, "fgh"),
        ("always", "fgh"),
        ("never", ""),
        ({"never": {"tool_names": ["f"]}}, "gh"),
        ({"always": {"tool_names": ["f"]}}, "f"),
        ({"always": {"tool_names": ["f"]}, "never": {"tool_names": ["f", "g"]}}, "fh"),
    ],
)
def test_which_tools_ask(rule: Any, asking: str) -> None:
    assert names_that_ask(rule, "fgh", "x") == frozenset(asking)


def test_an_assistant_that_goes_on_is_still_the_same_one() -> None:
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    call = {"id": "1"}
    after = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool"}]
    joined = conversation(before, after)
    assert [m["role"] for m in joined] == ["user", "assistant", "tool"]
    assert joined[1] == {"role": "assistant", "content": "b", "tool_calls": [call]}
    assert conversation(before, []) == before


def test_what_has_been_called_is_not_called_again(client: openai.OpenAI) -> None:
    """A client that stores nothing sends everything back in every turn."""
    first = ask(client, tools=[ASKING], store=False)
    request = first.output[-1]
    history = [{"role": "user", "content": "hi"}, *(i.model_dump() for i in first.output)]
    history.append(said(request, approve=True))
    options: dict[str, Any] = {"tools": [ASKING], "store": False, "max_output_tokens": 30}
    second = client.responses.create(model="mock", input=history, **options)
    assert [item.type for item in second.output].count("mcp_call") == 1
    history += [i.model_dump() for i in second.output]
    history.append({"role": "user", "content": "thanks"})
    third = client.responses.create(model="mock", input=history, **options)
    assert [item.type for item in third.output].count("mcp_call") == 0


@pytest.mark.parametrize("wrong", [{"temperature": 5}, {"max_output_tokens": 10**9}], ids=str)
def test_nothing_is_called_for_a_request_that_is_wrong(
    server: ServerProcess, asked: Any, wrong: dict[str, Any]
) -> None:
    body = {
        "model": "mock",
        "previous_response_id": asked.id,
        "input": [said(asked.output[-1], approve=True)],
        "tools": [ASKING],
        **wrong,
    }
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)
    assert response.status_code == 400


def test_the_model_may_not_call_by_itself_if_it_may_not(client: openai.OpenAI, asked: Any) -> None:
    answer = said(asked.output[-1], approve=True)
    made = go_on(client, asked, answer, tool_choice="none")
    assert [item.type for item in made.output][1:] == ["mcp_call", "message"]
    forced: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    made = go_on(client, asked, answer, **forced, max_output_tokens=200)
    assert [item.type for item in made.output][1:] == ["mcp_call", "mcp_approval_request"]


def test_in_the_background_it_is_in_progress_before_it_calls(
    client: openai.OpenAI, asked: Any
) -> None:
    made = go_on(client, asked, said(asked.output[-1], approve=True), background=True)
    with client.responses.retrieve(made.id, stream=True) as events:
        kinds = [event.type for event in events]
    assert kinds.index("response.in_progress") < kinds.index("response.mcp_call.in_progress")


@pytest.mark.parametrize("identifier", [[], {}, 7, None])
def test_odd_items_are_no_requests(server: ServerProcess, identifier: Any) -> None:
    item = {"type": "mcp_approval_request", "id": identifier}
    body = {"model": "mock", "input": [item, {"role": "user", "content": "hi"}]}
    response = httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)
    assert response.status_code == 200


def test_half_a_surrogate_pair_is_no_servers_fault() -> None:
    assert arguments_in('{"a": "\\ud800"}') is None
    assert arguments_in("[1]") is None
    assert arguments_in('{"a": 1}') == {"a": 1}


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tool 'delete_al'"):
        names_that_ask({"always": {"tool_names": ["delete_al"]}}, ["delete_all"], "x")
