"""How a conversation is put to the model, what its answer has to match, and how it is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import msgspec

from engine import AsyncEngine, Grammar, InvalidRequest, SamplingParams
from server import harmony
from server.answer_parser import AnswerParser, Parser
from server.constraints import constraint
from server.dialect import MISTRAL, Dialect, dialect_of, taught, with_calls_as_text
from server.harmony import HarmonyParser
from server.tools import Offered

# How many tokens of reasoning an effort stands for; None is no limit.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 8192,
    "high": None,
    "xhigh": None,
}
# How templates are told whether to have the model reason: Qwen's, DeepSeek's and Granite's names.
SWITCHES = ("enable_thinking", "thinking")
# Granite 3's, which has answers in tags if it is told to reason.
ANSWER_TAG = "<response>"
# Gemma 4's template opens no turn behind results of calls that words came with.
TURN_END, TURN = "<turn|>\n", "<|turn>model\n"
NINE = re.compile(r"[a-zA-Z0-9]{9}")


@dataclass(frozen=True)
class Wishes:
    """What a request wants of an answer: tools, a form and the field that it came by, reasoning
    (by effort, and by tokens at most, and the fields of both), and variables for the template."""

    offered: Offered | None = None
    form: tuple[Grammar, str] | None = None
    effort: str | None = None
    effort_field: str = "reasoning_effort"
    budget: int | None = None
    budget_field: str = "thinking_token_budget"
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int | None:
        """The most tokens of reasoning; None if any number."""
        limits = (None if self.effort is None else EFFORTS[self.effort], self.budget)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def for_template(self) -> dict[str, Any]:
        """The variables, with what switches reasoning on or off."""
        asked = self.effort is not None or self.budget is not None
        switched = dict.fromkeys(SWITCHES, self.tokens != 0) if asked else {}
        effort = {} if self.effort is None else {"reasoning_effort": self.effort}
        return switched | effort | dict(self.variables)


@dataclass(frozen=True)
class Answering:
    """A prompt, and how its answers are drawn and read; `parser` is None if all is content."""

    ids: list[int]
    grammar: Grammar | None = None
    parser: Callable[[], Parser] | None = None
    marks: bool = False
    """Whether special tokens have to be shown for the parser to find calls or reasoning."""
    names: dict[str, str] = field(default_factory=dict)

    def applied(self, params: SamplingParams) -> SamplingParams:
        """The parameters for such answers."""
        changes: dict[str, Any] = {"grammar": self.grammar}
        if self.marks:
            changes["skip_special_tokens"] = False
        return msgspec.structs.replace(params, **changes)


async def prepare_answer(
    engine: AsyncEngine,
    messages: Sequence[dict[str, Any]],
    wishes: Wishes,
    *,
    name: str = "messages",
    **options: Any,
) -> Answering:
    """Make the prompt of `messages` (see `ChatTemplate.render`, which takes the `options`), and all
    that belongs to its answer. Raises InvalidRequest; `name` is the field of the messages."""
    parts, offered = engine.parts, wishes.offered
    template = parts.tokenizer.chat_template
    dialect = dialect_of(template)
    tools: Sequence[Mapping[str, Any]] | None = None
    if offered is not None and offered.choice != "none":
        tools = [tool.as_template_input() for tool in offered.tools]
    variables = wishes.for_template
    tagged = template is not None and ANSWER_TAG in template.source
    if tagged and variables.get("thinking") and "thinking" not in wishes.variables:
        del variables["thinking"]
    if dialect.style is harmony.STYLE:
        variables = harmony.variables(variables)
    messages, tools = for_template(dialect, messages, tools)
    prompt, ids = await encode_chat(
        engine, messages, name, tools=tools, variables=variables, **options
    )
    reasons, begun = _reasoning(dialect, prompt, wishes)
    await _check(engine, wishes)
    combine = partial(
        constraint,
        parts.tokenizer,
        dialect,
        offered,
        None if wishes.form is None else wishes.form[0],
        reasons=reasons,
        begun=begun,
        budget=wishes.budget if dialect.style is harmony.STYLE else wishes.tokens,
    )
    # The schemas of many tools take their time.
    held = offered is not None and offered.enforced
    grammar = await anyio.to_thread.run_sync(combine) if held else combine()
    calls = offered is not None and offered.choice != "none"
    called = offered.names if offered is not None else ()
    parser: Callable[[], Parser] | None = None
    if dialect.style is harmony.STYLE:
        parser = partial(HarmonyParser, names=called, opening=harmony.opening_of(prompt))
    elif calls or reasons or dialect.channels is not None:
        parser = partial(
            AnswerParser,
            style=dialect.style if calls else None,
            names=called,
            schemas={} if offered is None else {t.name: t.parameters for t in offered.tools},
            thinking=dialect.thinking if reasons else None,
            begun=begun,
            channels=dialect.channels,
        )
    hidden = list(dialect.style.begins) if calls or dialect.style is harmony.STYLE else []
    if dialect.thinking is not None and (reasons or dialect.channels is not None):
        hidden += dialect.thinking
    special = {parts.tokenizer.mark_id(text) for text in hidden} & parts.tokenizer.special_ids
    names = {"grammar": wishes.form[1] if wishes.form is not None else "tools"}
    return Answering(ids, grammar, parser, bool(special), names)


def for_template(
    dialect: Dialect,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Sequence[dict[str, Any]], Sequence[Mapping[str, Any]] | None]:
    """Messages and tools as the template of a dialect takes them."""
    if dialect.style is MISTRAL:
        messages = [_with_short_ids(message) for message in messages]
    if dialect.style is harmony.STYLE:
        messages = harmony.told(messages)
    if not dialect.shows_calls:
        messages = with_calls_as_text(messages)
    if not dialect.shows_tools and (tools or any(_speaks_of_tools(m) for m in messages)):
        messages, tools = taught(dialect.style, messages, tools or []), None
    return messages, tools


async def encode_chat(
    engine: AsyncEngine, messages: Sequence[dict[str, Any]], name: str = "messages", **options: Any
) -> tuple[str, list[int]]:
    """The prompt that the chat template makes, and its ids; errors name the client's field."""
    try:
        prompt = engine.render_chat(messages, **options)
        if prompt.endswith(TURN_END) and options.get("add_generation_prompt", True):
            prompt += TURN
        return prompt, await engine.encode(prompt, add_special_tokens=False)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=name, code=error.code) from error


def effort_of(value: Any, name: str) -> str | None:
    """A request's reasoning effort. Raises InvalidRequest unless it is one."""
    if value is not None and not (isinstance(value, str) and value in EFFORTS):
        raise InvalidRequest(f"{name} must be one of {', '.join(EFFORTS)}", param=name)
    return None if value is None else str(value)


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Mistral's templates take ids of calls of nine letters or digits, and no others."""

    def short(identifier: str) -> str:
        if NINE.fullmatch(identifier):
            return identifier
        return hashlib.blake2b(identifier.encode()).hexdigest()[:9]

    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**c, "id": short(c["id"])} for c in message["tool_calls"]]
    if "tool_call_id" in message:
        changed["tool_call_id"] = short(message["tool_call_id"])
    return changed


def _speaks_of_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _reasoning(dialect: Dialect, prompt: str, wishes: Wishes) -> tuple[bool, bool]:
    """Whether the model may reason, and whether its prompt has begun to."""
    if dialect.style is harmony.STYLE:
        return wishes.tokens != 0, harmony.has_begun(prompt)
    if dialect.thinking is None:
        wanted = wishes.effort not in (None, "none")
        if wanted or wishes.budget is not None:
            raise InvalidRequest(
                "this model's template knows no reasoning; leave its effort and budget out",
                param=wishes.effort_field if wanted else wishes.budget_field,
            )
        return False, False
    begin, end = dialect.thinking
    said = prompt.rstrip()
    return not said.endswith(end), said.endswith(begin)


async def _check(engine: AsyncEngine, wishes: Wishes) -> None:
    """See that each part of a larger grammar can be enforced, so that errors name their field."""
    checked = [] if wishes.form is None else [wishes.form]
    offered = wishes.offered
    if offered is not None and offered.enforced:
        checked += [
            (Grammar.json_schema(tool.arguments), f"tools.[{number}].function.parameters")
            for number, tool in enumerate(offered.tools)
            if tool in offered.callable_tools and (tool.strict or offered.forced)
        ]
    for grammar, param in checked:
        try:
            await anyio.to_thread.run_sync(engine.parts.compiler.matcher, grammar)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param=param, code=error.code) from error
