"""Chat templates: messages to a prompt, in jinja2's sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError, InvalidRequest

END_MARK = "\ue000end of message\ue000"


class TemplateRefusal(Exception):
    """Raised by a template's own `raise_exception`."""


class ChatTemplate:
    """A model's template. Templates come with model files, so they run sandboxed."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is broken: {error}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self.source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages` (role and content); InvalidRequest if they do not fit. With
        `continue_final` it ends where the last message does, which the model then goes on with.
        `tools` and `variables` (such as `enable_thinking`) are what the template makes of them."""
        if continue_final:
            return self._render_open(messages, tools, variables)
        given = dict(variables or {}) | self._tokens
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **given,
            )
        except (jinja2.TemplateError, TemplateRefusal, TypeError) as error:
            raise InvalidRequest(
                f"the model's chat template cannot format these messages: {error}",
                param="messages",
                code="chat_template_refused",
            ) from error

    def _render_open(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        if not messages or messages[-1].get("role") != "assistant":
            raise InvalidRequest(
                "the last message has to be the assistant's to be continued", param="messages"
            )
        # A mark behind the text says where it ends, whatever the template trims or adds.
        begun = messages[-1]["content"].rstrip()
        marked = [*messages[:-1], {**messages[-1], "content": begun + END_MARK}]
        rendered = self.render(
            marked, add_generation_prompt=False, tools=tools, variables=variables
        )
        before, found, _ = rendered.rpartition(END_MARK)
        if not found:
            raise InvalidRequest(
                "the model's chat template leaves the last message out",
                param="messages",
                code="chat_template_refused",
            )
        return before


def _tojson(value: Any, indent: int | None = None) -> str:
    """Unlike jinja2's own filter, this does not escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).strftime(pattern)
