"""JSON schemas for generation: an object has the properties that are named, and no others.

To a validator a schema that says nothing of further properties allows any. A model that may write any goes on writing
them, so that servers read such schemas as closed (as xgrammar does by default, and OpenAI asks for in strict mode).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Their branches may name properties that their neighbours do not: closing any of them would forbid the others.
_COMPOSING = ("allOf", "anyOf", "oneOf", "if", "then", "else", "not", "$ref", "dependentSchemas", "patternProperties")
_SAYS_ITSELF = ("additionalProperties", "unevaluatedProperties")
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("prefixItems", "anyOf", "oneOf")
_SINGLES = ("items",)


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema`, in which every object that names properties allows no others, unless it says so itself.

    Raises:
        RecursionError: it is nested too deeply.
    """
    result = dict(schema)
    for name in _MAPS:
        if isinstance(inner := result.get(name), Mapping):
            result[name] = {key: _closed(value) for key, value in inner.items()}
    for name in _LISTS:
        if isinstance(inner := result.get(name), list):
            result[name] = [_closed(value) for value in inner]
    for name in _SINGLES:
        result |= {name: _closed(result[name])} if name in result else {}
    is_open = any(name in result for name in (*_COMPOSING, *_SAYS_ITSELF))
    return result if "properties" not in result or is_open else {**result, "additionalProperties": False}


def _closed(value: Any) -> Any:
    return closed_schema(value) if isinstance(value, Mapping) else value
