"""What an answer's whole text has to match, as one grammar: reasoning, calls of tools, and form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engine import Grammar, InvalidRequest
from engine.text.grammar import embedded
from engine.text.schemas import DEFINITIONS, refers_to_definitions
from engine.text.tokenizer import Tokenizer
from server import harmony
from server.answer_parser import Style
from server.dialect import GEMMA4, PYTHON, Dialect
from server.gemma_calls import GemmaCalls
from server.lark import any_text, form_rule, literal, mark
from server.marked_calls import GLM
from server.marked_grammar import MarkedCalls
from server.python_calls import python_call
from server.tools import ANY_OBJECT, Offered

# An answer that begins otherwise than calls do.
PLAIN_TEXT = r"PLAIN: /[^{\[<\s](.|\n)*/"


def constraint(
    tokenizer: Tokenizer,
    dialect: Dialect,
    offered: Offered | None,
    form: Grammar | None,
    *,
    reasons: bool,
    begun: bool,
    budget: int | None,
) -> Grammar | None:
    """The grammar of an answer; None if it may be anything.

    `form` is what the answer's content has to match; `reasons` says that reasoning may come first,
    `begun` that the prompt has begun it, `budget` how many tokens it may have. Raises
    InvalidRequest if a form cannot be combined with the rest.
    """
    if dialect.style is harmony.STYLE:
        return harmony.answer_grammar(
            tokenizer, offered, form, reasons=reasons, begun=begun, budget=budget
        )
    calls = offered is not None and offered.enforced
    if form is not None and not (calls or reasons):
        return form
    if form is None and not calls and not (reasons and budget is not None):
        return None
    rules: list[str] = []
    body = any_text(rules) if form is None else form_rule(form)
    if offered is not None and calls:
        parts = _calls(tokenizer, dialect, offered, rules)
        if offered.forced:
            body = "calls"
        elif form is not None:
            body = f"calls | {body}"
        else:
            body = _free(parts, rules)
    start = "answer"
    if reasons and dialect.thinking is not None:
        start = _reasoning(tokenizer, dialect.thinking, rules, begun=begun, budget=budget)
    return Grammar("lark", "\n".join([f"start: {start}", f"answer: {body}", *rules]))


def _reasoning(
    tokenizer: Tokenizer,
    thinking: tuple[str, str],
    rules: list[str],
    *,
    begun: bool,
    budget: int | None,
) -> str:
    begin, end = thinking
    any_text(rules)
    closing = tokenizer.mark_id(end)
    if closing is not None:
        cap = "" if budget is None else f"[max_tokens={max(1, budget)}]"
        rules.append(f"thought{cap}: TEXT")
        rules.append(f"reasoning: thought <[{closing}]>")
    elif budget is None:
        rules.append(f"reasoning[suffix={literal(end)}]: TEXT")
    else:
        raise InvalidRequest(
            f"this model has no token of its own for {end!r}, so its reasoning cannot be limited",
            param="thinking_token_budget",
        )
    opened = f"{mark(tokenizer, begin)} reasoning answer"
    # A model that reasons may also answer at once, unless its prompt has begun the reasoning.
    return "reasoning answer" if begun else f"{opened} | answer"


@dataclass(frozen=True)
class Calls:
    """How calls are written: a mark, the call itself, and what parts it from the next."""

    begin: str
    call: str
    separator: str


def _calls(tokenizer: Tokenizer, dialect: Dialect, offered: Offered, rules: list[str]) -> Calls:
    """Adds the rule `calls`: one call or, if that is allowed, several."""
    names, style = [], dialect.style
    # Of a kind that has no lines around them.
    inline = dialect.marks is GLM
    gemma = GemmaCalls(tokenizer, rules)
    for number, tool in enumerate(offered.callable_tools):
        names.append(f"call_{number}")
        schema = tool.arguments if tool.strict or offered.forced else ANY_OBJECT
        call = None
        if style is GEMMA4:
            call = gemma.call(names[-1], tool.name, schema)
        if style is PYTHON:
            call = python_call(rules, names[-1], tool.name, schema)
        if dialect.marks is not None:
            marked = MarkedCalls(tokenizer, dialect.marks, rules)
            call = marked.call(names[-1], tool.name, schema)
        if call is None:
            call = _call(style, tool.name, schema)
            call = rf'"\n" {call} "\n"' if inline else call
        rules.append(f"{names[-1]}: {call}")
    one = f"({' | '.join(names)})"
    begin = mark(tokenizer, style.begins[0])
    if inline or style in (GEMMA4, PYTHON):
        parts = Calls(begin, f"{one} {mark(tokenizer, style.end)}", r'"\n"' if inline else "")
    elif style.name == "mistral":
        parts = Calls(begin, one, "")
    elif style.name == "llama3":
        parts = Calls("", one, '"; "')
    else:
        parts = Calls(begin, rf'"\n" {one} "\n" {mark(tokenizer, style.end)}', r'"\n"')
    whole = f"{parts.begin} {parts.call}"
    more = f" ({parts.separator} {whole})*" if offered.parallel else ""
    rules.append(f"calls: {whole}{more}")
    return parts


def _call(style: Style, name: str, schema: dict[str, Any]) -> str:
    """One call of one tool. Its schema stays a document of its own, so that its references hold."""
    if style.name == "llama3" and (whole := _one_schema(name, schema)) is not None:
        return f"%json {embedded(Grammar.json_schema(whole))}"
    body = f"%json {embedded(Grammar.json_schema(schema))}"
    if style.name == "mistral":
        return f"{literal(name + '[ARGS]')} {body}"
    key = "parameters" if style.name == "llama3" else "arguments"
    head = f'{{"name": {json.dumps(name)}, "{key}": '
    return f'{literal(head)} {body} "}}"'


def _one_schema(name: str, schema: dict[str, Any]) -> dict[str, Any] | None:
    """A call as one schema, so that JSON which is none can begin alike; None if the arguments'
    schema refers to itself as a whole."""
    inner = dict(schema)
    shared: dict[str, Any] = {key: inner.pop(key) for key in DEFINITIONS if key in inner}
    if not refers_to_definitions(schema):
        return None
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": inner},
        "required": ["name", "parameters"],
        "additionalProperties": False,
        **shared,
    }


def _free(calls: Calls, rules: list[str]) -> str:
    """Text in which calls may come, but only right ones."""
    if not calls.begin:
        rules.append(PLAIN_TEXT)
        return 'calls | PLAIN | ""'
    # What announces a call comes with the text before it: spelled out, its end is not known before.
    lazy = "[lazy]" if calls.begin.startswith('"') else ""
    rules.append(f"head{lazy}: {any_text(rules)} {calls.begin}")
    return f"(head {calls.call})* TEXT"
