"""What an answer's form may be asked for by, and the grammar that it is."""

from __future__ import annotations

import json
from typing import Any

from engine import Grammar, InvalidRequest

# The names that vLLM gave to the notations, then and now, and llama.cpp's.
NOTATIONS = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
FLAT = {f"guided_{name}": name for name in NOTATIONS} | {"grammar": "grammar"}
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')


def asked_form(body: Any) -> tuple[Grammar, str] | None:
    """The grammar that a body's fields ask for, and the field to blame for it.

    Raises InvalidRequest naming the field if one is malformed, or several contradict.
    """
    found: list[tuple[Grammar, str]] = []
    if (form := getattr(body, "response_format", None)) is not None:
        found += _response_format(form)
    if (settings := getattr(body, "structured_outputs", None)) is not None:
        found += _structured_outputs(settings)
    for field, notation in FLAT.items():
        if (value := getattr(body, field, None)) is not None:
            found.append((_grammar(notation, value, field), field))
    if len(found) > 1:
        raise InvalidRequest(
            f"{found[0][1]} and {found[1][1]} both say what the answer has to match; give one",
            param=found[1][1],
        )
    return found[0] if found else None


def text_format(text: Any) -> tuple[Grammar, str] | None:
    """The same for the Responses API's `text`, which has `json_schema`'s fields in its format."""
    if text is None:
        return None
    form = text.get("format") if isinstance(text, dict) else 1
    if form is not None and not isinstance(form, dict):
        raise InvalidRequest("text must be an object with a format", param="text")
    if not form or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return ANY_OBJECT, "text.format"
    if form.get("type") != "json_schema":
        raise _unknown_type(form, "text.format.type")
    return _schema(form, "text.format"), "text.format.schema"


def _response_format(form: Any) -> list[tuple[Grammar, str]]:
    if not isinstance(form, dict):
        raise InvalidRequest("response_format must be an object", param="response_format")
    kind = form.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        # llama.cpp takes a schema here.
        if "schema" not in form:
            return [(ANY_OBJECT, "response_format")]
        return [(_schema(form, "response_format"), "response_format.schema")]
    if kind != "json_schema":
        raise _unknown_type(form, "response_format.type")
    inner = form.get("json_schema")
    if not isinstance(inner, dict):
        raise InvalidRequest(
            "response_format.json_schema is missing; it holds the schema",
            param="response_format.json_schema",
        )
    where = "response_format.json_schema"
    return [(_schema(inner, where), f"{where}.schema")]


def _schema(holder: dict[str, Any], where: str) -> Grammar:
    schema = holder.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{where}.schema must be a JSON schema", param=f"{where}.schema")
    return Grammar.json_schema(schema)


def _structured_outputs(settings: Any) -> list[tuple[Grammar, str]]:
    name = "structured_outputs"
    if not isinstance(settings, dict):
        raise InvalidRequest(f"{name} must be an object", param=name)
    found: list[tuple[Grammar, str]] = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        field = f"{name}.{key}"
        if key in NOTATIONS:
            found.append((_grammar(key, value, field), field))
        elif key == "json_object" and value is True:
            found.append((ANY_OBJECT, field))
        else:
            raise InvalidRequest(
                f"{field[:100]} is not supported by this server; it knows "
                f"{', '.join(NOTATIONS)} and json_object",
                param=name,
                code="unsupported_parameter",
            )
    return found


def _grammar(notation: str, value: Any, field: str) -> Grammar:
    """A grammar in a notation by its short name."""
    if notation == "json":
        if isinstance(value, str):
            return Grammar("json_schema", value)
        if isinstance(value, dict):
            return Grammar.json_schema(value)
        raise InvalidRequest(f"{field} must be a JSON schema", param=field)
    if notation == "choice":
        return Grammar("choice", json.dumps(value))
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} must be text", param=field)
    if notation == "regex":
        return Grammar("regex", value)
    return Grammar("gbnf" if "::=" in value else "lark", value)


def _unknown_type(form: dict[str, Any], param: str) -> InvalidRequest:
    kind = str(form.get("type"))[:50]
    return InvalidRequest(
        f"{param} is {kind!r}; it must be text, json_object or json_schema",
        param=param,
        code="unsupported_parameter",
    )
