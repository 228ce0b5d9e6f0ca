"""Parts of grammars in Lark's notation, as llguidance reads it."""

from __future__ import annotations

import json

from llguidance import regex_to_lark

from engine import Grammar, InvalidRequest
from engine.text.grammar import embedded
from engine.text.tokenizer import Tokenizer

ANY_TEXT = r"TEXT: /(.|\n)*/"


def any_text(rules: list[str]) -> str:
    """A rule for any text, which is among `rules` afterwards."""
    if ANY_TEXT not in rules:
        rules.append(ANY_TEXT)
    return "TEXT"


def form_rule(form: Grammar) -> str:
    """What the content has to match, within a larger grammar. Raises InvalidRequest if it cannot
    stand there."""
    if form.kind == "json_schema":
        return f"%json {embedded(form)}"
    if form.kind == "regex":
        return f"/{regex_to_lark(form.text)}/"
    if form.kind == "choice":
        return "(" + " | ".join(literal(text) for text in json.loads(form.text)) + ")"
    raise InvalidRequest(
        "a grammar of one's own cannot be part of a larger one, which tools, reasoning and "
        "gpt-oss's messages take; use a JSON schema, a regular expression or a choice",
        param="grammar",
    )


def mark(tokenizer: Tokenizer, text: str) -> str:
    """A mark as grammars name it: by its token, and spelled out what has none or is behind it."""
    head, bracket, rest = text.partition(">")
    for known, left in ((text, ""), (head + bracket, rest)):
        if (token := tokenizer.mark_id(known)) is not None:
            return f"<[{token}]> {literal(left)}" if left else f"<[{token}]>"
    return literal(text)


def literal(text: str) -> str:
    """Text as grammars write it."""
    return json.dumps(text, ensure_ascii=False)
