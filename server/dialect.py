"""How a model's chat template has it reason and call tools, and how others are taught to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.text.chat import ChatTemplate
from server import harmony
from server.answer_parser import Style
from server.gemma_calls import gemma_call
from server.marked_calls import GLM, QWEN, Marks, marked_call
from server.python_calls import as_python, python_calls

# Qwen 2.5 and 3, Hermes 2 and 3, and many after them; GLM from 4.5 on and Qwen3-Coder, which mark
# arguments.
HERMES = Style("hermes", ("<tool_call>",), "</tool_call>", reader=marked_call)
# Llama 3.1 to 3.3.
LLAMA = Style("llama3", ("<|python_tag|>",), leading=True, special=True)
# Mistral from 7B-v0.3 on: a list, or since v11 names and arguments.
MISTRAL = Style(
    "mistral", ("[TOOL_CALLS]",), named=True, parts=("[CALL_ID]", "[ARGS]"), special=True
)
# Gemma writes what its prompt shows it, in a fence.
GEMMA = Style("gemma", ("```tool_call", "```tool_code", "```json"), "```", leading=True)
GEMMA4 = Style("gemma4", ("<|tool_call>",), "<tool_call|>", reader=gemma_call)
# LFM2's, whose older templates show lists of tools, and no calls.
PYTHON = Style(
    "python", ("<|tool_call_start|>",), "<|tool_call_end|>", reader=python_calls, lists=True
)
# What everybody else is taught: Hermes' form, or JSON alone.
GENERIC = Style("json", ("<tool_call>",), "</tool_call>", leading=True)

THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<reasoning>", "</reasoning>"),
    ("<|channel>thought", "<channel|>"),
)

TEACHING = """You can call these tools. Each is described by a JSON object:
{tools}

To call a tool, answer with nothing but
{example}
with the tool's name and its arguments as JSON. {more}Otherwise answer in plain words."""
MORE = "For several calls write one after the other. "


@dataclass(frozen=True)
class Dialect:
    """What is known of a template: the style of its calls, whether it shows tools itself, the
    markers around its reasoning, if it has any, those of arguments that are no JSON, and whether it
    shows calls that were made."""

    style: Style
    shows_tools: bool
    thinking: tuple[str, str] | None
    marks: Marks | None = None
    shows_calls: bool = True

    @property
    def channels(self) -> tuple[str, str] | None:
        """Markers of reasoning that may stand anywhere: Gemma 4 opens another, or closes one that
        is closed, once in a while."""
        return self.thinking if self.style is GEMMA4 else None


def dialect_of(template: ChatTemplate | None) -> Dialect:
    """What a template's source tells."""
    source = "" if template is None else template.source
    style = _style(source)
    # Its reasoning has a channel instead of markers.
    known = () if style is harmony.STYLE else THINKING
    thinking = next((marks for marks in known if marks[1] in source), None)
    marks = next((marks for marks in (QWEN, GLM) if marks.key in source), None)
    return Dialect(
        style,
        "tools" in source,
        thinking,
        marks if style is HERMES else None,
        style is not PYTHON or "tool_calls" in source,
    )


def _style(source: str) -> Style:
    if "<|channel|>" in source and "<|message|>" in source:
        return harmony.STYLE
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<|tool_call>" in source:
        return GEMMA4
    if "<|tool_call_start|>" in source or "<|tool_list_start|>" in source:
        return PYTHON
    if "<tool_call>" in source:
        return HERMES
    if "<|python_tag|>" in source or ("tools" in source and "<|start_header_id|>" in source):
        return LLAMA
    return GEMMA if "<start_of_turn>" in source else GENERIC


def call_text(style: Style, name: str, arguments: str) -> str:
    """A call as a model that was taught writes it; `arguments` are JSON."""
    body = f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
    return f"{style.begins[0]}\n{body}\n{style.end}"


def with_calls_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template of PYTHON's that shows content alone."""
    told = []
    for message in messages:
        text = message.get("content") or ""
        if calls := message.get("tool_calls"):
            text += f"{PYTHON.begins[0]}{as_python(calls)}{PYTHON.end}"
        told.append({**message, "content": text})
    return told


def taught(
    style: Style, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages for a template that knows nothing of tools: the tools in the system's message, calls
    and results as text."""
    told: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        calls = [
            call_text(style, c["function"]["name"], json.dumps(c["function"]["arguments"]))
            for c in message.get("tool_calls") or ()
        ]
        if calls:
            text = "\n".join([text, *calls] if text else calls)
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        if told and role == "user" and told[-1]["role"] == "user":
            told[-1]["content"] += "\n" + text  # results of several calls
        else:
            told.append({"role": role, "content": text})
    if not tools:
        return told
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = call_text(style, "<name>", "<arguments>").replace('"<name>"', "<name>")
    teaching = TEACHING.format(tools=lines, example=example, more=MORE)
    if told and told[0]["role"] == "system":
        first = {"role": "system", "content": f"{told[0]['content']}\n\n{teaching}"}
        return [first, *told[1:]]
    return [{"role": "system", "content": teaching}, *told]
