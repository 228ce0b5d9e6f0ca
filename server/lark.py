"""Parts of grammars in Lark's notation, as llguidance reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence

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


def in_order(
    rules: list[str], label: str, members: Sequence[tuple[str, bool]], separator: str
) -> str:
    """Members by their rules in a row, those that are not needed left out or not, the separator
    between them; rules of `label` are added."""
    # From the end on: what may follow a member, and what may stand first.
    follows, firsts = '""', '""'
    for number, (rule, needed) in reversed(list(enumerate(members))):
        first = f"{rule} {follows}"
        rules.append(f"{label}_from_{number}: {first if needed else f'{first} | {firsts}'}")
        more = f"{literal(separator)} {rule} {follows}"
        rules.append(f"{label}_more_{number}: {more if needed else f'{more} | {follows}'}")
        firsts, follows = f"{label}_from_{number}", f"{label}_more_{number}"
    return firsts
