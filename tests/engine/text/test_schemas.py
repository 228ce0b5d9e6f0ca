"""Schemas looked into."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from engine.text.schemas import (
    MAX_INTEGER,
    forget_dialects,
    forget_formats,
    narrow,
    schemas_of,
    settle_alternatives,
)

CIRCLE = {"type": "object", "properties": {"kind": {"const": "circle"}}, "required": ["kind"]}
SQUARE = {"type": "object", "properties": {"kind": {"enum": ["square"]}}, "required": ["kind"]}


def test_every_schema_has_its_pointer_and_values_are_none() -> None:
    schema = {
        "properties": {"a": {"items": {"type": "string"}}},
        "anyOf": [{"const": {"properties": {"no": {}}}}],
    }
    assert [place for place, _ in schemas_of(schema)] == [
        "",
        "/properties/a",
        "/properties/a/items",
        "/anyOf/0",
    ]


@pytest.mark.parametrize(
    "choices",
    [
        [{"type": "string"}, {"type": "integer"}, {"type": ["null", "object"]}],
        [{"const": 1}, {"enum": [2, 3]}],
        [CIRCLE, SQUARE],
        [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/square"}],
    ],
    ids=["types", "values", "discriminator", "references"],
)
def test_alternatives_that_exclude_one_another_are_any_of(choices: list[Any]) -> None:
    schema = {"$defs": {"circle": CIRCLE, "square": SQUARE}, "items": {"oneOf": choices}}
    settled = copy.deepcopy(schema)
    settle_alternatives(settled)
    assert settled == {**schema, "items": {"anyOf": choices}}


@pytest.mark.parametrize(
    "choices",
    [
        [{"type": "string"}, {"type": "string", "maxLength": 3}],
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"type": "integer"}],
        [CIRCLE, {**SQUARE, "required": []}],
        [CIRCLE, {}],
        [CIRCLE, True],
        [{"$ref": "#/nowhere"}, {"$ref": "#/items"}],
    ],
    ids=str,
)
def test_others_stay(choices: list[Any]) -> None:
    schema = {"items": {"oneOf": choices}}
    settled = copy.deepcopy(schema)
    settle_alternatives(settled)
    assert settled == schema


BOUNDED = {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}
COUNT = {"type": "integer", "maximum": 3}
A = {"properties": {"a": COUNT}}
CLOSED = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "narrowed"),
    [
        ({"type": "integer"}, {"type": "integer", **BOUNDED}),
        ({"type": ["null", "integer"]}, {"type": ["null", "integer"], **BOUNDED}),
        (A, A | CLOSED),
        ({"properties": {}}, {"properties": {}} | CLOSED),
        ({"items": A}, {"items": A | CLOSED}),
        ({"$defs": {"x": A}, "$ref": "x"}, {"$defs": {"x": A | CLOSED}, "$ref": "x"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_hardly_meant_is_left_out(schema: Any, narrowed: Any) -> None:
    found = copy.deepcopy(schema)
    narrow(found)
    assert found == narrowed


@pytest.mark.parametrize(
    "schema",
    [
        COUNT,
        {"type": "number"},
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "required": ["a", "b"]},
        {**A, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"allOf": [A, {"properties": {"b": COUNT}}]},
        {"$defs": {"x": A}, "allOf": [{"$ref": "#/$defs/x"}, {"properties": {"b": COUNT}}]},
        {"enum": [{"properties": {}}]},
        {**A, "enum": [{"a": 1, "b": 2}], "properties": {"a": {"type": "string"}}},
        {"$ref": "#/$defs/x", "properties": {"b": COUNT}, "$defs": {"x": A}},
        {"type": "integer", "anyOf": [{"minimum": 2**60}]},
        {"type": "integer", "allOf": [{"minimum": 2**60}]},
        {"not": A},
        {"oneOf": [{**A, "required": ["a"]}, {"properties": {"b": COUNT}}]},
        {**A, "anyOf": [{"properties": {"b": COUNT}, "required": ["b"]}]},
        True,
    ],
    ids=str,
)
def test_the_rest_stays(schema: Any) -> None:
    found = copy.deepcopy(schema)
    narrow(found)
    assert found == schema


def test_dialects_that_would_have_to_be_fetched_are_forgotten() -> None:
    known = "https://json-schema.org/draft/2020-12/schema"
    schema = {
        "$schema": "http://127.0.0.1:1/evil",
        "items": [{"$schema": "file:///etc/passwd", "type": "string"}],
        "const": {"$schema": "http://x/y"},
        "properties": {"$schema": {"type": "string"}},
        "$defs": {"x": {"$schema": known}},
    }
    forget_dialects(schema)
    assert schema == {
        "items": [{"type": "string"}],
        "const": {"$schema": "http://x/y"},
        "properties": {"$schema": {"type": "string"}},
        "$defs": {"x": {"$schema": known}},
    }


def test_formats_that_nobody_enforces_are_annotations() -> None:
    secret, day = {"type": "string", "format": "password"}, {"type": "string", "format": "date"}
    schema = {"properties": {"format": secret, "day": day}, "default": {"format": "password"}}
    forget_formats(schema)
    assert schema == {
        "properties": {"format": {"type": "string"}, "day": {"type": "string", "format": "date"}},
        "default": {"format": "password"},
    }
