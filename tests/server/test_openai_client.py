"""OpenAI's own Python client against a real server process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ServerProcess

MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT = "<user>hi\n<assistant>"


def text_of(prompt: str, count: int) -> str:
    return bytes(continuation(list(prompt.encode()), count)).decode()


@pytest.fixture(scope="module")
def client(mock: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mock.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=8)  # type: ignore[call-overload]
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(PROMPT, 8)
    assert (choice.finish_reason, answer.object) == ("length", "chat.completion")
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 8 + len(PROMPT))
    assert answer.id.startswith("chatcmpl-")


def test_a_streamed_chat_answer(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            model="mock",
            messages=MESSAGES,
            max_completion_tokens=8,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *events, last = chunks
    assert (last.choices, last.usage.completion_tokens) == ([], 16)
    assert all(chunk.usage is None for chunk in events)
    for index in range(2):
        deltas = [c.choices[0] for c in events if c.choices[0].index == index]
        assert (deltas[0].delta.role, deltas[0].delta.content) == ("assistant", "")
        assert all(d.delta.role is None for d in deltas[1:])
        assert "".join(d.delta.content or "" for d in deltas) == text_of(PROMPT, 8)
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
        assert deltas[-1].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_async_client_streams_many_at_once(mock: ServerProcess) -> None:
    import anyio

    results: dict[int, str] = {}
    async with openai.AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="x") as client:

        async def one(number: int) -> None:
            stream = await client.completions.create(
                model="mock", prompt=f"prompt {number}", max_tokens=10, stream=True
            )
            results[number] = "".join([c.choices[0].text async for c in stream])

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(one, number)
    assert results == {n: text_of(f"prompt {n}", 10) for n in range(20)}


def test_completions_of_several_prompts_are_numbered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="mock", prompt=["ab", "cd"], max_tokens=3, n=2)
    texts = [(c.index, c.text) for c in answer.choices]
    ab, cd = text_of("ab", 3), text_of("cd", 3)
    assert texts == [(0, ab), (1, ab), (2, cd), (3, cd)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)


def test_token_prompts_and_the_default_length(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="mock", prompt=[97, 98])
    assert answer.choices[0].text == text_of("ab", 16)
    both = client.completions.create(model="mock", prompt=[[97, 98], [99]], max_tokens=1)
    assert [c.text for c in both.choices] == [text_of("ab", 1), text_of("c", 1)]


def test_echo_shows_the_prompt_with_its_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="mock", prompt="abc", echo=True, logprobs=1, max_tokens=2
    )
    (choice,) = answer.choices
    assert choice.text == "abc" + text_of("abc", 2)
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert "".join((choice.logprobs.tokens or [])[3:]) == text_of("abc", 2)


def test_a_prompt_can_be_scored_without_continuing_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="mock", prompt="abc", echo=True, logprobs=0, max_tokens=0
    )
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_streamed_echo_comes_first_and_once(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="mock", prompt="abc", echo=True, max_tokens=4, stream=True, logprobs=1
    )
    chunks = [c.choices[0] for c in stream]
    assert "".join(c.text for c in chunks) == "abc" + text_of("abc", 4)
    assert chunks[0].text.startswith("abc")
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]
    offsets = [o for c in chunks if c.logprobs for o in c.logprobs.text_offset or []]
    assert offsets == list(range(7))


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        model="mock", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == text_of(PROMPT, 2)
    assert bytes(content[0].bytes).decode() == content[0].token
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5]


def test_stop_strings_never_show_in_part(client: openai.OpenAI) -> None:
    whole = text_of(PROMPT, 30)
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="mock", messages=MESSAGES, stop=[whole[10:13], "zzzz"], stream=True
    )
    text = ""
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        assert whole[:10].startswith(text)
    assert text == whole[:10]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("mock", "ryzanstein")
    assert client.models.retrieve("mock").id == "mock"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_errors_have_openais_classes_codes_and_params(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)  # type: ignore[call-overload]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="mock", prompt="x" * 1000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(  # type: ignore[call-overload]
            model="mock", messages=[{"role": "user", "content": "x" * 1000}]
        )
    assert (chat.value.code, chat.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as hot:
        client.completions.create(model="mock", prompt="x", temperature=3)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(  # type: ignore[call-overload]
            model="mock", messages=MESSAGES, tools=[{"type": "web_search"}]
        )
    assert (tools.value.param, tools.value.code) == ("tools.[0].type", "unsupported_parameter")


def test_a_client_that_closes_mid_stream_frees_its_pages(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(model="mock", prompt="ab", max_tokens=150, stream=True)
        for _, _ in zip(range(3), stream, strict=False):
            pass
        assert server.metric("ryzanstein_kv_pages_used") > 0
        steps = server.metric("ryzanstein_steps_total")
        stream.close()
        assert server.idle(2)
        assert server.metric("ryzanstein_steps_total") - steps < 20
        assert server.metric('ryzanstein_requests_finished_total{reason="abort"}') == 1


def test_a_timeout_of_a_plain_request_frees_its_pages(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.01)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="mock", prompt="ab", max_tokens=150, timeout=0.3)
        assert server.idle(2)
        assert server.metric('ryzanstein_requests_finished_total{reason="abort"}') == 1


def test_a_failed_step_is_an_error_event_and_the_next_request_is_served(
    mock_server: MockFactory,
) -> None:
    server = mock_server(delay=0.01)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(model="mock", prompt="ab", max_tokens=150, stream=True)
        next(iter(stream))
        httpx.post(f"{server.url}/test/fail")
        with pytest.raises(openai.APIError, match="step failed"):
            list(stream)
        httpx.post(f"{server.url}/test/fail")
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="mock", prompt="ab", max_tokens=5)
        assert error.value.status_code == 503
        answer = client.completions.create(model="mock", prompt="ab", max_tokens=5)
        assert answer.choices[0].text == text_of("ab", 5)


def test_api_keys(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["right", "other"]})
    for key in ("right", "other"):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert client.completions.create(model="mock", prompt="a", max_tokens=1).choices
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert error.value.code == "invalid_api_key"


def test_a_full_queue_is_429_with_retry_after(mock_server: MockFactory) -> None:
    server = mock_server(delay=0.02, max_running=1, max_waiting=2)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(model="mock", prompt="a", max_tokens=100, stream=True)
        next(iter(stream))
        waiting = client.completions.create(model="mock", prompt="a", max_tokens=1, stream=True)
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="mock", prompt="b", n=2)
        waiting.close()
        assert error.value.code == "rate_limit_exceeded"
        assert int(error.value.response.headers["retry-after"]) >= 1
        stream.close()


def test_the_same_seed_gives_the_same_text_in_any_company(tiny: ServerProcess) -> None:
    """On real arithmetic: sampled text alone equals sampled text in a busy batch."""
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="x") as client:

        def text(seed: int | None = 5) -> str:
            answer = client.completions.create(
                model="tiny", prompt="Tell me", max_tokens=24, seed=seed, temperature=1.0
            )
            return answer.choices[0].text

        alone = text()
        busy = [
            client.completions.create(
                model="tiny",
                prompt=f"noise {i}",
                max_tokens=300,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for i in range(4)
        ]
        assert text() == alone
        assert text(6) != alone
        assert len({text(None) for _ in range(3)}) > 1
        for stream in busy:
            stream.close()
    deadline = time.monotonic() + 10
    while not tiny.idle(1):
        assert time.monotonic() < deadline
