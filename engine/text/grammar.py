"""Grammars that answers have to match, compiled for a model's vocabulary by `llguidance`."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.errors import InvalidRequest
from engine.text.schemas import (
    forget_dialects,
    forget_formats,
    narrow,
    schemas_of,
    settle_alternatives,
)
from engine.text.tokenizer import Tokenizer
from engine.types import Grammar

MAX_GRAMMAR_BYTES = 1 << 18
KEPT = 64
# Between two parts of a JSON text: one space, or a line's end and an indentation. Small models that
# may write any number of blanks can go on with them for ever.
WHITESPACE = r"[ ]|\n[ ]{0,40}"
UNIMPLEMENTED = "Unimplemented keys: "


class GrammarCompiler:
    """Compiles grammars, and keeps those that were used last. Any thread may call it.

    `vocab_size` is the number of the model's logits, which may be above the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        limits: LLParserLimits | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._open = tokenizer
        self._limits = limits or LLParserLimits(verbose_errors=False)
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock, self._opening = threading.Lock(), threading.Lock()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at its beginning. Takes milliseconds, the first time up to a second; raises
        InvalidRequest that says what is wrong with the grammar, and where."""
        with self._lock:
            known = self._compiled.get(grammar)
        if known is None:
            # Not under the lock: whoever has a grammar that is known does not wait for this one.
            known = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = known
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return known.deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.text.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
            raise _bad(grammar, f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
        with self._opening:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._open(), self.vocab_size)
        text = as_llguidance(grammar)
        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            # Some are too large only once they are followed; that is seen at the first mask.
            first = matcher.deep_copy()
            first.compute_bitmask()
            matcher = first if first.is_error() else matcher
        if problem := matcher.get_error():
            raise _bad(grammar, _located(grammar, problem.partition("\n<")[0].strip()))
        return matcher


def as_llguidance(grammar: Grammar) -> str:
    """A grammar in llguidance's own form. Raises InvalidRequest if it cannot be read."""
    text = grammar.text
    if grammar.kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(enforced(grammar), overrides=OPTIONS))
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    if grammar.kind == "choice":
        choices = _json(grammar)
        if not isinstance(choices, list) or not choices or not all(map(_is_text, choices)):
            raise _bad(grammar, "it has to be a list of texts, none of them empty")
        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {alternatives}"))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(text))
    try:
        return str(llguidance.grammar_from("gbnf", text))
    except ValueError as error:
        raise _bad(grammar, str(error)) from error


OPTIONS: Any = {"whitespace_pattern": WHITESPACE}


def enforced(grammar: Grammar) -> Any:
    """A schema as it is enforced. Raises InvalidRequest if it is none."""
    schema = read_schema(grammar)
    forget_formats(schema)
    settle_alternatives(schema)
    narrow(schema)
    return schema


def embedded(grammar: Grammar) -> str:
    """A schema as part of a larger grammar, in Lark's `%json`."""
    schema = enforced(grammar)
    return json.dumps({"x-guidance": OPTIONS, **schema} if isinstance(schema, dict) else schema)


def read_schema(grammar: Grammar) -> Any:
    """A schema that is one. Raises InvalidRequest with the JSON pointer of what is wrong."""
    schema = _json(grammar)
    if not isinstance(schema, (dict, bool)):
        raise _bad(grammar, "it has to be an object")
    forget_dialects(schema)
    try:
        jsonschema_rs.meta.validate(schema)
    except jsonschema_rs.ValidationError as error:
        where = "".join(f"/{part}" for part in error.instance_path) or "/"
        raise _bad(grammar, f"at {where}: {error.message[:300]}") from error
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        raise _bad(grammar, str(error)[:300]) from error
    return schema


def _vocabulary(tokenizer: Tokenizer, size: int) -> LLTokenizer:
    """What llguidance knows of a model's tokens."""
    ends = sorted(token for token in tokenizer.eos_token_ids if token < size)
    if not ends:
        raise InvalidRequest("the model names no token that ends an answer; leave the grammar out")
    return LLTokenizer(_Vocabulary(tokenizer, size, ends[0]), n_vocab=size, eos_token=ends)


class _Vocabulary(llguidance.TokenizerWrapper):
    """A tokenizer under the names that llguidance looks for."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        self.eos_token_id = end
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        # A grammar names them by their ids; other text never becomes one.
        self.special_token_ids = sorted(i for i in tokenizer.mark_ids if i < size)
        self.is_tokenizer_wrapper = True
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def _json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise _bad(grammar, f"it is no JSON: {error}") from error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _located(grammar: Grammar, problem: str) -> str:
    """Where a schema has the keyword, or the value, that cannot be enforced."""
    if grammar.kind != "json_schema":
        return problem[:1000]
    schema = json.loads(grammar.text)
    if problem.startswith(UNIMPLEMENTED):
        names = json.loads(problem.removeprefix(UNIMPLEMENTED))
        places = [p for p, part in schemas_of(schema) if any(name in part for name in names)]
        where = f" at {places[0] or '/'}" if places else ""
        return f"{', '.join(names)} cannot be enforced by this server{where}"
    if problem.startswith("oneOf"):
        places = [place for place, part in schemas_of(schema) if "oneOf" in part]
        return (
            f"oneOf cannot be enforced at {places[0] or '/'}, because a value could match several "
            "of its schemas; use anyOf, or give each a required property with a const of its own"
        )
    # The keyword whose value the complaint quotes.
    quoted = [
        (len(value), place)
        for place, part in schemas_of(schema)
        for key, value in part.items()
        if key in ("$ref", "type", "pattern", "format")
        and isinstance(value, str)
        and value in problem
    ]
    where = f"at {max(quoted)[1] or '/'}: " if quoted else ""
    return where + problem[:300]


def _bad(grammar: Grammar, problem: str) -> InvalidRequest:
    names = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice"}
    name = names.get(grammar.kind, "grammar")
    return InvalidRequest(f"the {name} cannot be used: {problem}", param="grammar")
