"""From OpenAI's request fields to the engine's: sampling parameters and prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine import InvalidRequest, SamplingParams, Terms
from server.answering import Wishes, effort_of
from server.protocol import ChatRequest, CompletionRequest, Sampled
from server.structured import asked_form
from server.tenants import Client
from server.tools import offered_tools

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for plain completions
MAX_PROMPTS = 256
DAY_MS = 86_400_000

Prompt = str | list[int]

# Fields that the engine knows by the same name.
SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)


def sampling_of(
    request: ChatRequest | CompletionRequest, recommended: Mapping[str, Any]
) -> SamplingParams:
    """The engine's parameters, as `recommended` where the request says nothing. Ranges are checked
    by the engine; what only HTTP knows, here."""
    shared = sampling_fields(request, recommended)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "stream_options is only allowed when stream is true", param="stream_options"
        )
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise InvalidRequest(
            "stream_options.include_obfuscation is not supported by this server; leave it out",
            param="stream_options.include_obfuscation",
            code="unsupported_parameter",
        )
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = request.max_completion_tokens
        shared["max_tokens"] = request.max_tokens if limit is None else limit
        shared["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
        return SamplingParams(**shared)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest(
            "best_of other than n is not supported by this server", param="best_of"
        )
    shared["logprobs"] = request.logprobs
    limit = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    # Scoring a prompt without continuing it: the engine needs one token, which is not shown.
    shared["max_tokens"] = 1 if limit == 0 and request.echo else limit
    if request.echo and request.logprobs is not None:
        shared["prompt_logprobs"] = request.logprobs
    return SamplingParams(**shared)


def terms_of(client: Client, body: Sampled) -> Terms:
    """Whose a request is and when it is due, from its key, its headers and its body.

    Raises InvalidRequest naming the field or header.
    """
    if body.priority is not None and abs(body.priority) > 1000:
        raise InvalidRequest("priority must be between -1000 and 1000", param="priority")
    target = body.target_itl_ms
    # Derived here, from the key, so that no request can look into another tenant's cache; a salt
    # parts a tenant's own users.
    namespace = client.tenant.encode()
    if body.cache_salt is not None:
        if not body.cache_salt:
            raise InvalidRequest("cache_salt is empty; leave it out", param="cache_salt")
        namespace += b"\0" + hashlib.sha256(body.cache_salt.encode("utf-8", "replace")).digest()
    return Terms(
        tenant=client.tenant,
        namespace=namespace,
        priority=body.priority or 0,
        deadline=_seconds("deadline_ms", body.deadline_ms),
        first_token_deadline=_seconds("x-slo-ttft-ms", client.headers.get("x-slo-ttft-ms")),
        target_itl=0.0 if target is None else _seconds("target_itl_ms", target),
        trace=client.trace,
    )


def _seconds(name: str, milliseconds: float | str | None) -> float:
    if milliseconds is None:
        return math.inf
    try:
        value = float(milliseconds)
    except ValueError:
        value = math.nan
    if not 0 < value <= DAY_MS:
        raise InvalidRequest(
            f"{name} must be a number of milliseconds above 0, at most a day", param=name
        )
    return value / 1e3


def sampling_fields(request: Sampled, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of all endpoints that were given or are `recommended`, by the engine's names."""
    given = dict(recommended)
    given |= {name: value for name in SHARED if (value := getattr(request, name, None)) is not None}
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    return given


def _logit_bias(raw: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in raw.items()}
    except ValueError:
        raise InvalidRequest(
            "logit_bias maps token ids to numbers; a key is not a number", param="logit_bias"
        ) from None


def truncated(ids: list[int], body: Sampled) -> list[int]:
    """The last `truncate_prompt_tokens` of a prompt."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if not 1 <= keep < 2**31:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {keep}; it must be at least 1, and below 2^31",
            param="truncate_prompt_tokens",
        )
    return ids[-keep:]


def prompts_of(prompt: Any) -> list[Prompt]:
    """The prompts of a plain completion: text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(
            "prompt must be a string, a list of strings, token ids, or a list of token-id lists, "
            "and not empty",
            param="prompt",
        )
    if all(_is_id(item) for item in prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} are allowed", param="prompt"
        )
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if all(isinstance(item, list) and all(_is_id(x) for x in item) for item in prompt):
        return list(prompt)
    raise InvalidRequest("prompt mixes kinds; give strings only, or token ids only", param="prompt")


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def template_input(request_messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as chat templates want them."""
    if not request_messages:
        raise InvalidRequest("messages is empty; give at least one", param="messages")
    messages = [m.as_template_input(number) for number, m in enumerate(request_messages)]
    check_results(messages, "messages")
    return messages


def check_results(messages: Sequence[dict[str, Any]], name: str) -> None:
    """InvalidRequest if a tool's result refers to a call that nobody made."""
    made: set[str] = set()
    for number, message in enumerate(messages):
        made.update(call["id"] for call in message.get("tool_calls") or ())
        if message["role"] == "tool" and message["tool_call_id"] not in made:
            raise InvalidRequest(
                f"no call before it has the id {message['tool_call_id'][:64]!r}",
                param=f"{name}.[{number}].tool_call_id",
            )


def wishes_of(body: ChatRequest) -> Wishes:
    """What a chat request wants of its answer. Raises InvalidRequest naming the field."""
    budget = body.thinking_token_budget
    if budget is not None and budget < 0:
        raise InvalidRequest(
            "thinking_token_budget must be at least 0", param="thinking_token_budget"
        )
    return Wishes(
        offered=offered_tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        form=asked_form(body),
        effort=effort_of(body.reasoning_effort, "reasoning_effort"),
        budget=budget,
        variables=body.chat_template_kwargs or {},
    )
