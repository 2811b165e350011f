"""What a model may add to an object."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from amoe.server.closed_schema import closed_schema

NAMED: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
MORE = {"a": 1, "b": 2}


def allows(schema: dict[str, Any], value: object) -> bool:
    return jsonschema.Draft202012Validator(closed_schema(schema)).is_valid(value)


@pytest.mark.parametrize(
    "schema",
    [
        NAMED,
        {"type": "array", "items": NAMED},
        {"type": "object", "properties": {"inner": NAMED}},
        {"anyOf": [NAMED, {"type": "integer"}]},
        {"$ref": "#/$defs/X", "$defs": {"X": NAMED}},
    ],
)
def test_no_other_property_at_any_depth(schema: dict[str, Any]) -> None:
    wrap = {"items": lambda v: [v], "properties": lambda v: {"inner": v}}
    shape = "items" if "items" in schema else "properties" if "inner" in schema.get("properties", {}) else None
    make = wrap[shape] if shape else lambda v: v
    assert allows(schema, make({"a": 1}))
    assert not allows(schema, make(MORE))


@pytest.mark.parametrize(
    "schema",
    [
        NAMED | {"additionalProperties": True},
        NAMED | {"additionalProperties": {"type": "integer"}},
        NAMED | {"patternProperties": {"^b": {"type": "integer"}}},
        {"allOf": [NAMED, {"type": "object", "properties": {"b": {"type": "integer"}}}]},
        {"type": "object"},
    ],
)
def test_what_says_so_stays_open(schema: dict[str, Any]) -> None:
    assert allows(schema, MORE)


def test_what_is_not_a_schema_stays() -> None:
    odd = {"properties": {"a": True, "properties": NAMED}, "items": False, "enum": [{"properties": 1}]}
    assert closed_schema(odd)["properties"]["a"] is True
    assert closed_schema(odd)["enum"] == [{"properties": 1}]
    assert NAMED == {"type": "object", "properties": {"a": {"type": "integer"}}}, "the user's own stays as it was"
