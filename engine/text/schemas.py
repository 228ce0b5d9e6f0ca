"""JSON schemas looked into: their parts, and which of them exclude one another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

Schema = dict[str, Any]
# A schema's keywords that hold schemas by name, in a list, and what only looks like one.
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
DEFINITIONS = ("$defs", "definitions")
VALUES = ("enum", "const", "default", "examples")
# What brings other schemas to bear on the same value.
COMBINING = (
    "allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "not", "if", "then", "else",
    "dependentSchemas", "unevaluatedProperties",
)  # fmt: skip
ANNOTATIONS = (
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$id",
    "$schema", "$comment", "$anchor", "$defs", "definitions", "discriminator",
)  # fmt: skip
# What says more about an object's properties.
BESIDE = ("additionalProperties", "patternProperties", "minProperties", "enum", "const")
DRAFTS = tuple(
    f"http{'' if number < '2' else 's'}://json-schema.org/{name}/schema"
    for number, name in (
        ("04", "draft-04"), ("06", "draft-06"), ("07", "draft-07"),
        ("2019", "draft/2019-09"), ("2020", "draft/2020-12"),
    )
)  # fmt: skip
# More alternatives are not compared with each other.
MAX_CHOICES = 128
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const")
MAX_INTEGER = 2**53 - 1
# References are followed so far.
MAX_HOPS = 16
# Kinds of texts that are enforced.
FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip


def schemas_of(schema: Any, at: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema within a schema, with its JSON pointer."""
    if not isinstance(schema, dict):
        return
    yield at, schema
    for key, value in schema.items():
        parts: list[tuple[str, Any]] = []
        if key in BY_NAME and isinstance(value, dict):
            parts = [(f"{at}/{key}/{name}", part) for name, part in value.items()]
        elif key in LISTS and isinstance(value, list):
            parts = [(f"{at}/{key}/{number}", part) for number, part in enumerate(value)]
        elif key not in VALUES:
            parts = [(f"{at}/{key}", value)]
        for place, part in parts:
            yield from schemas_of(part, place)


def refers_to_definitions(schema: Any) -> bool:
    """Whether all that a schema refers to are its document's definitions."""
    prefixes = tuple(f"#/{key}/" for key in DEFINITIONS)
    references = (part["$ref"] for _, part in schemas_of(schema) if "$ref" in part)
    return all(str(reference).startswith(prefixes) for reference in references)


def forget_dialects(schema: Any) -> None:
    """Take out, in place, every `$schema` that names no known draft: whoever validates a schema by
    one would have to fetch it."""
    for _, part in list(schemas_of(schema)):
        named = part.get("$schema")
        if isinstance(named, str) and named.rstrip("#") not in DRAFTS:
            del part["$schema"]


def forget_formats(schema: Any) -> None:
    """Take out, in place, every `format` that is not enforced: to those who do not know one it is
    an annotation, as the specification has it (`password`, `path`)."""
    for _, part in list(schemas_of(schema)):
        if part.get("format") not in FORMATS:
            part.pop("format", None)


def settle_alternatives(schema: Any) -> None:
    """Write `oneOf` as `anyOf`, in place, where no value can match two of its schemas: there the
    two mean the same. Unions with a discriminator are of this kind."""
    for _, part in list(schemas_of(schema)):
        choices = part.get("oneOf")
        if isinstance(choices, list) and len(choices) <= MAX_CHOICES and "anyOf" not in part:
            resolved = [_resolved(choice, schema) for choice in choices]
            if all(_disjoint(a, b) for a, b in combinations(resolved, 2)):
                part["anyOf"] = part.pop("oneOf")


def narrow(schema: Any) -> None:
    """Leave out, in place, what a schema allows but hardly means, so that small models come to an
    end: properties that are not named, and integers beyond those that every reader of JSON takes
    (RFC 7493). All that still matches, matches the schema as it was."""
    parts = list(schemas_of(schema))
    # Where several schemas hold for one value, each may name only some of what it can be.
    if any(_holds_with_others(part) for _, part in parts):
        return
    for _, part in parts:
        named = part.get("properties")
        alone = not any(word in part for word in BESIDE)
        if alone and isinstance(named, dict) and set(part.get("required", ())) <= set(named):
            part["additionalProperties"] = False
        kind = part.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        bounded = "number" in kinds or any(word in part for word in BOUNDS)
        if "integer" in kinds and not bounded:
            part["minimum"], part["maximum"] = -MAX_INTEGER, MAX_INTEGER


def _holds_with_others(part: Schema) -> bool:
    """Whether a schema puts other schemas beside what it says itself, or beside each other."""
    said = [word for word in part if word not in ANNOTATIONS and not word.startswith("x-")]
    combining = [word for word in said if word in COMBINING]
    several = isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1
    return bool(combining) and (
        len(said) > 1 or several or bool({"not", "if", "oneOf"} & set(said))
    )


def _resolved(schema: Any, root: Any) -> Schema:
    """What a schema that is only a reference within the document refers to."""
    for _ in range(MAX_HOPS):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            break
        found: Any = root
        for name in schema["$ref"].removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        schema = found
    return schema if isinstance(schema, dict) else {}


def _disjoint(a: Schema, b: Schema) -> bool:
    """Whether it is plain that no value matches both."""
    values = _values(a), _values(b)
    if None not in values:
        return not any(x in values[1] for x in values[0])  # type: ignore[union-attr, operator]
    kinds = _kinds(a), _kinds(b)
    if None not in kinds and not kinds[0] & kinds[1]:  # type: ignore[operator]
        return True
    if kinds != ({"object"}, {"object"}):
        return False
    both = set(a.get("required", ())) & set(b.get("required", ()))
    fields = a.get("properties", {}), b.get("properties", {})
    return any(
        isinstance(fields[0].get(name), dict)
        and isinstance(fields[1].get(name), dict)
        and _disjoint(fields[0][name], fields[1][name])
        for name in both
    )


def _values(schema: Schema) -> list[Any] | None:
    """All values that a schema can have, if it lists them."""
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else None


def _kinds(schema: Schema) -> set[str] | None:
    """The types that a schema names."""
    kind = schema.get("type")
    listed = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else None
    kinds = None if listed is None else {name for name in listed if isinstance(name, str)}
    return kinds | {"integer"} if kinds and "number" in kinds else kinds
