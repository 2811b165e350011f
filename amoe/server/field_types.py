"""Types of request fields: what a client may send for them, with the bounds that /openapi.json tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from amoe.types import SamplingParams

MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = SamplingParams.MAX_BAD_WORDS // 2  # each is two token sequences
MAX_BAD_WORD_CHARS = 256
MAX_LOGIT_BIASES = SamplingParams.MAX_BIASES
MAX_LOGIT_BIAS = 100.0
MAX_TOKEN_ID = 2**31 - 1

_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_NULL = {"type": "null"}


def null_means(value: Any) -> BeforeValidator:
    """null means the default `value`, as in OpenAI's API."""

    def choose(given: Any) -> Any:
        return value if given is None else given

    return BeforeValidator(choose)


def _check_texts(strings: Sequence[Any], max_count: int, max_chars: int, what: str) -> tuple[str, ...]:
    if not all(isinstance(entry, str) for entry in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > max_count or any(len(entry) > max_chars for entry in strings):
        raise ValueError(f"at most {max_count} {what} of at most {max_chars} characters")
    if any(not entry for entry in strings):
        raise ValueError("must not hold an empty string")
    if any("\ud800" <= char <= "\udfff" for entry in strings for char in entry):
        raise ValueError("must be valid Unicode, without halves of surrogate pairs")
    return tuple(strings)


def _parse_stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise ValueError("must be a string or a list of strings")
    return _check_texts(strings, MAX_STOP_STRINGS, MAX_STOP_CHARS, "stop strings")


def _parse_bad_words(value: Any) -> tuple[str, ...]:
    words = [] if value is None else value
    if not isinstance(words, list):
        raise ValueError("must be a list of strings")
    words = _check_texts(words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS, "words")
    if any(not word.strip() for word in words):
        raise ValueError("a word of white space alone is none")
    return tuple(words)


def is_ids(value: Any) -> bool:
    """A list of whole numbers, truth values not counted as such."""
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """One entry per prompt."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_ids(value):
            return [value]
        if all(isinstance(entry, str) for entry in value) or all(is_ids(entry) for entry in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _parse_spans(value: Any) -> tuple[tuple[int, int], ...]:
    spans = [] if value is None else value
    if isinstance(spans, list) and len(spans) > SamplingParams.MAX_SPANS:
        raise ValueError(f"must hold at most {SamplingParams.MAX_SPANS} pairs")
    if not isinstance(spans, list) or not all(is_ids(span) and len(span) == 2 for span in spans):
        raise ValueError("must be a list of [start, end] pairs of token positions, such as [[0, 16], [20, 24]]")
    return tuple((start, end) for start, end in spans)


def _parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    biases = {} if value is None else value
    if not isinstance(biases, dict):
        raise ValueError('must be an object of token ids and biases, such as {"50256": -100}')
    if len(biases) > MAX_LOGIT_BIASES:
        raise ValueError(f"at most {MAX_LOGIT_BIASES} tokens")
    pairs = {}
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise ValueError(f"{name[:40]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise ValueError(f"the bias of token {name} must be a number in [-100, 100]")
        pairs[int(name)] = float(bias)
    return tuple(sorted(pairs.items()))


def _parse_allowed_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not is_ids(value):
        raise ValueError("must be a list of token ids")
    if not value:
        raise ValueError("is empty: nothing could be sampled")
    return tuple(sorted(set(value)))


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_parse_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                    "maxItems": MAX_STOP_STRINGS,
                },
                _NULL,
            ]
        }
    ),
]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_parse_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "array", "items": _TOKEN_ID, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": _TOKEN_ID, "minItems": 1}, "minItems": 1},
            ]
        }
    ),
]
StopTokenIds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)], ...],
    Field(max_length=SamplingParams.MAX_STOP_IDS, fail_fast=True),
    null_means(()),
]
Spans = Annotated[
    tuple[tuple[int, int], ...],
    PlainValidator(_parse_spans),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0},
                        "minItems": 2,
                        "maxItems": 2,
                    },
                    "maxItems": SamplingParams.MAX_SPANS,
                },
                _NULL,
            ]
        }
    ),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_parse_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                    "additionalProperties": {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS},
                    "maxProperties": MAX_LOGIT_BIASES,
                },
                _NULL,
            ]
        }
    ),
]
AllowedIds = Annotated[
    tuple[int, ...],
    PlainValidator(_parse_allowed_ids),
    WithJsonSchema({"anyOf": [{"type": "array", "items": _TOKEN_ID, "minItems": 1}, _NULL]}),
]
BadWords = Annotated[
    tuple[str, ...],
    PlainValidator(_parse_bad_words),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARS, "pattern": r"\S"},
                    "maxItems": MAX_BAD_WORDS,
                },
                _NULL,
            ]
        }
    ),
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
