"""Two hundred JSON schemas of the kinds that people ask language models to fill in."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def text(most: int = 24, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def fields(**properties: Schema) -> Schema:
    """A closed object that has all of its properties, as strict schemas do."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def items(schema: Schema, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": schema, "maxItems": most, **more}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


NUMBER: Schema = {"type": "number", "minimum": -1000, "maximum": 100000}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}
DATE: Schema = {"type": "string", "format": "date"}
MOMENT: Schema = {"type": "string", "format": "date-time"}
EMAIL: Schema = {"type": "string", "format": "email", "maxLength": 30}
UUID: Schema = {"type": "string", "format": "uuid"}
ADDRESS: Schema = fields(
    street=text(), city=text(16), zip={"type": "string", "pattern": "^[0-9]{5}$"}
)
MONEY: Schema = fields(amount=NUMBER, currency=one_of("USD", "EUR", "JPY"))

# Extraction, classification, plans, forms: closed objects.
CLOSED: list[Schema] = [
    fields(sentiment=one_of("positive", "negative", "neutral"), confidence=SHARE),
    fields(label=one_of("spam", "ham"), reason=text(60)),
    fields(answer=text(80), sources=items(text(20))),
    fields(entities=items(fields(name=text(16), kind=one_of("person", "place", "organisation")))),
    fields(name=text(), age=COUNT, email=EMAIL),
    fields(name=text(), address=ADDRESS, tags=items(text(10))),
    fields(
        invoice=text(12), date=DATE, total=MONEY, lines=items(fields(item=text(12), price=NUMBER))
    ),
    fields(title=text(30), steps=items(fields(number=COUNT, text=text(40)))),
    fields(recipe=text(20), ingredients=items(fields(name=text(12), grams=COUNT)), minutes=COUNT),
    fields(event=text(20), start=MOMENT, end=MOMENT, people=items(EMAIL, 2)),
    fields(id=UUID, created=MOMENT, status=one_of("open", "closed", "in progress")),
    fields(summary=text(120), keywords=items(text(12), 5, minItems=1)),
    fields(question=text(60), options=items(text(20), 4, minItems=2), correct=COUNT),
    fields(language=one_of("Deutsch", "Français", "日本語", "English"), text=text(40)),
    fields(query=text(40), limit={"type": "integer", "minimum": 1, "maximum": 50}),
    fields(path={"type": "string", "pattern": r"^/[a-z]{1,8}(/[a-z]{1,8}){0,2}$"}, write=FLAG),
    fields(host={"type": "string", "format": "hostname", "maxLength": 20}, port=COUNT),
    fields(address={"type": "string", "format": "ipv4"}, up=FLAG),
    fields(phone={"type": "string", "pattern": r"^\+[0-9]{1,3} [0-9]{6,10}$"}, name=text(12)),
    fields(colour={"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"}, alpha=SHARE),
    fields(version={"type": "string", "pattern": r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}$"}),
    fields(time={"type": "string", "format": "time"}, zone=text(10)),
    fields(lat={"type": "number", "minimum": -90, "maximum": 90}, lon=NUMBER, place=text(16)),
    fields(code=text(200), language=one_of("python", "rust", "c++")),
    fields(thought=text(200), action=one_of("search", "answer"), input=text(40)),
    fields(essay={"type": "string", "minLength": 40, "maxLength": 300}),
    fields(rating={"type": "integer", "minimum": 1, "maximum": 5}, review=text(100), again=FLAG),
    fields(matrix=items(items(COUNT, 3, minItems=3), 3, minItems=3)),
    fields(point={"type": "array", "prefixItems": [NUMBER, NUMBER], "items": False, "minItems": 2}),
    fields(nothing={"type": "null"}, something=maybe(text(10))),
    fields(score={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    fields(parent=fields(child=fields(grandchild=fields(name=text(10), age=COUNT)))),
    fields(first=text(10), middle=maybe(text(10)), last=text(10), born=maybe(DATE)),
    fields(verdict={"const": "guilty"}, years=COUNT),
    fields(order=UUID, items=items(fields(sku=text(8), amount=COUNT, gift=FLAG), 2), pay=MONEY),
    fields(
        sql=text(120), parameters=items({"type": ["string", "integer", "null"], "maxLength": 8})
    ),
    fields(uri={"type": "string", "format": "uri", "maxLength": 40}, method=one_of("GET", "POST")),
]

TREE: Schema = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LINKED: Schema = {
    "type": "object",
    "properties": {"value": COUNT, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}
EXPRESSION: Schema = {
    "$defs": {
        "expression": {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": 99},
                fields(
                    op=one_of("+", "-", "*"),
                    left={"$ref": "#/$defs/expression"},
                    right={"$ref": "#/$defs/expression"},
                ),
            ]
        }
    },
    "type": "object",
    "properties": {"expression": {"$ref": "#/$defs/expression"}},
    "required": ["expression"],
    "additionalProperties": False,
}
SHAPES: Schema = {
    "$defs": {
        "circle": fields(kind={"const": "circle"}, radius=NUMBER),
        "square": fields(kind={"const": "square"}, side=NUMBER),
    },
    "type": "object",
    "properties": {
        "shapes": items({"oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/square"}]})
    },
    "required": ["shapes"],
}
OPEN: list[Schema] = [
    TREE,
    LINKED,
    EXPRESSION,
    SHAPES,
    {"type": "object", "properties": {"a": COUNT, "b": FLAG}, "additionalProperties": False},
    {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,4}$": COUNT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    {"type": "object", "additionalProperties": COUNT, "maxProperties": 3},
    {
        "type": "object",
        "properties": {"known": FLAG},
        "required": ["known"],
        "additionalProperties": text(8),
        "maxProperties": 3,
    },
    {"type": "array", "items": text(8), "minItems": 1, "maxItems": 4},
    {"type": "array", "items": fields(id=COUNT, ok=FLAG), "maxItems": 4},
    {"type": "string", "enum": ["north", "south", "east", "west"]},
    {"type": "integer", "minimum": 18, "maximum": 99},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"const": {"fixed": [1, "two", None]}},
    {
        "anyOf": [
            fields(ok={"const": True}, value=COUNT),
            fields(ok={"const": False}, error=text(20)),
        ]
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": COUNT}, "required": ["a"]},
            {"properties": {"b": FLAG}, "required": ["b"]},
        ]
    },
    {
        "type": ["object", "null"],
        "properties": {"x": COUNT},
        "required": ["x"],
        "additionalProperties": False,
    },
    {
        "title": "Described",
        "description": "With notes.",
        "type": "object",
        "properties": {
            "a": {
                "type": "string",
                "description": "A thing",
                "maxLength": 9,
                "default": "x",
                "examples": ["y"],
            }
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"when": {"type": "string", "format": "duration"}},
        "required": ["when"],
        "additionalProperties": False,
    },
]

# What forms are made of, for those that are put together at random.
LEAVES: list[Schema] = [
    text(8),
    text(20),
    text(40),
    NUMBER,
    COUNT,
    SHARE,
    FLAG,
    DATE,
    MOMENT,
    EMAIL,
    UUID,
    one_of("low", "medium", "high"),
    one_of(1, 2, 3, None),
    one_of("a/b", 'quo"ted', "über", "\\"),
    {"const": "fixed"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "minLength": 3, "maxLength": 12},
    {"type": ["integer", "null"]},
    {"type": "string", "format": "ipv4"},
    {"type": "integer", "enum": [10, 20, 30]},
]
NAMES = [
    "id",
    "name",
    "title",
    "status",
    "priority",
    "owner",
    "email",
    "phone",
    "city",
    "country",
    "date",
    "created",
    "price",
    "amount",
    "quantity",
    "currency",
    "notes",
    "description",
    "category",
    "tags",
    "score",
    "comment",
    "source",
    "target",
    "kind",
    "level",
]


def put_together(chance: random.Random, depth: int = 0) -> Schema:
    """An object of realistic fields: nested, optional, listed, referred to."""
    names = chance.sample(NAMES, chance.randint(2, 5 - depth))
    properties: dict[str, Schema] = {}
    for name in names:
        leaf = chance.choice(LEAVES)
        kind = chance.random()
        if kind < 0.15 and depth < 2:
            leaf = put_together(chance, depth + 1)
        elif kind < 0.3:
            leaf = items(leaf, chance.randint(1, 3), minItems=chance.randint(0, 1))
        elif kind < 0.4:
            leaf = maybe(leaf)
        properties[name] = leaf
    schema = fields(**properties)
    if chance.random() < 0.4:
        schema["required"] = names[: chance.randint(0, len(names))]
    if depth == 0 and chance.random() < 0.3:
        # As pydantic writes models: by reference.
        schema = {"$defs": {"Part": schema}, **fields(part={"$ref": "#/$defs/Part"}, count=COUNT)}
    return schema


def schemas(count: int = 200) -> list[Schema]:
    """The hand-written ones, then others put together, always the same."""
    chance = random.Random(8)
    found = [*CLOSED, *OPEN]
    while len(found) < count:
        found.append(put_together(chance))
    return found[:count]
