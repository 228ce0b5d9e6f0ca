"""OpenAI's request bodies as typed structs, decoded strictly.

A wrong type is a 400 that names the field. Fields that OpenAI has but this server cannot honour are
refused by name, never ignored; fields nobody knows are accepted with a warning.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec

from engine.errors import InvalidRequest
from server.errors import HTTPError
from server.tools import arguments_of

R = TypeVar("R", bound=msgspec.Struct)

Harmless = dict[str, tuple[Any, ...]]

# One that is escaped without its other half, as texts have it that were cut within a character.
HALF_PAIR = re.compile(
    rb"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})(?<!\\)(?:\\\\)*(\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
PATH = re.compile(r" - at `(?:key in )?\$(.*)`$")


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides deltas."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only text can be served."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """A function that was called; `arguments` are JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the assistant made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"

    def as_template_input(self, where: str) -> dict[str, Any]:
        """The call as chat templates want it, with arguments that can be looked into."""
        arguments = arguments_of(self.function.arguments, f"{where}.function.arguments")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None

    def as_template_input(self, number: int) -> dict[str, Any]:
        """The message as chat templates want it: role and text, calls with their arguments."""
        for field in ("function_call", "audio"):
            if getattr(self, field):
                raise InvalidRequest(
                    f"{field} of messages is not supported by this server",
                    param=f"messages.[{number}].{field}",
                )
        if self.role == "function":
            raise InvalidRequest(
                "messages of role 'function' are not supported; use role 'tool'",
                param=f"messages.[{number}].role",
            )
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._text(number)}
        if self.tool_calls:
            where = f"messages.[{number}].tool_calls"
            if role != "assistant":
                raise InvalidRequest("only the assistant calls tools", param=where)
            message["tool_calls"] = [
                call.as_template_input(f"{where}.[{place}]")
                for place, call in enumerate(self.tool_calls)
            ]
        if role == "tool":
            if self.tool_call_id is None:
                raise InvalidRequest(
                    "a tool's message needs the id of its call",
                    param=f"messages.[{number}].tool_call_id",
                )
            message["tool_call_id"] = self.tool_call_id
            message |= {} if self.name is None else {"name": self.name}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        return message

    def _text(self, number: int) -> str:
        where = f"messages.[{number}].content"
        if self.content is None:
            if self.tool_calls:
                return ""
            raise InvalidRequest("the message has no content", param=where)
        if isinstance(self.content, str):
            return self.content
        texts = []
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"content parts of type {part.type!r} are not supported; only text is",
                    param=where,
                )
            texts.append(part.text)
        return "".join(texts)


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of everything that generates: OpenAI's, and the usual extensions."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Extensions, under the names that vLLM gave them.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    # Extensions of this server.
    deadline_ms: float | None = None
    target_itl_ms: float | None = None


class GenerationRequest(Sampled, frozen=True, kw_only=True):
    """Fields that chat and plain completions share besides."""

    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    user: str | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    # What the answer has to match: OpenAI's, vLLM's and llama.cpp's ways to say it.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    grammar: Any = None
    # Refused unless they change nothing.
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    kv_transfer_params: Any = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # How the chat template is used, under vLLM's names.
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    # Refused unless they change nothing.
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    chat_template: Any = None
    documents: Any = None
    mm_processor_kwargs: Any = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """`POST /v1/completions`. `prompt` is text, token ids, or a list of either."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize`: `prompt`, or `messages` for the chat template's prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


# Value that changes nothing, for each field that cannot be honoured otherwise.
HARMLESS: Harmless = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "spaces_between_special_tokens": (True,),
    "kv_transfer_params": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


def decode(body: bytes, kind: type[R], harmless: Harmless = HARMLESS) -> tuple[R, list[str]]:
    """The typed request, and the names of fields that nobody knows.

    Raises HTTPError or InvalidRequest naming the field.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        half = HALF_PAIR.search(body)
        part = (half[1] or half[2]).decode() if half else ""
        reason = f"{part} is half of a surrogate pair" if part else str(error)
        raise HTTPError(
            400, f"the body is not valid JSON: {reason}", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise HTTPError(400, "the body is nested too deeply", code="invalid_json") from error
    refuse_unsupported(request, harmless)
    known = request.__struct_fields__
    return request, [name for name in fields if name not in known]


def refuse_unsupported(request: Any, harmless: Harmless) -> None:
    """InvalidRequest for the first field that cannot be honoured and would change something."""
    for name, values in harmless.items():
        value = getattr(request, name, None)
        if value is not None and value not in values:
            raise InvalidRequest(
                f"{name} is not supported by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )


def _invalid(message: str) -> InvalidRequest:
    """msgspec's complaint with its path taken apart: `$.stop[0]` becomes param `stop.[0]`."""
    found = PATH.search(message)
    if found is None:
        missing = re.search(r"missing required field `(\w+)`", message)
        return InvalidRequest(message, param=missing[1] if missing else None, code="invalid_type")
    param = found[1].lstrip(".").replace("[", ".[")
    return InvalidRequest(f"{param}: {message[: found.start()]}", param=param, code="invalid_type")
