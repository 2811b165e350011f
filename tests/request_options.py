"""Requests with any of the options that shape an answer, and what a client makes of an answer, whole or streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import strategies as st

MAX_TOKENS = 12

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
STRUCTURES = (
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": "[a-f]{2,8} ☃?"}},
    {"structured_outputs": {"choice": ["yes", "no", "Grüße"]}},
    {"structured_outputs": {"grammar": 'root ::= "(" root ")" | [0-9]+'}},
)

# Every one of these may be there or not, whatever the others are.
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.7, 1.5]),
    "top_p": st.sampled_from([0.3, 0.95, 1.0]),
    "top_k": st.sampled_from([-1, 0, 1, 40]),
    "min_p": st.sampled_from([0.0, 0.1]),
    "presence_penalty": st.sampled_from([-1.0, 2.0]),
    "frequency_penalty": st.sampled_from([-0.5, 1.5]),
    "repetition_penalty": st.sampled_from([0.8, 1.3]),
    "logit_bias": st.dictionaries(st.integers(0, 500).map(str), st.sampled_from([-100, -2.5, 5]), max_size=5),
    "allowed_token_ids": st.sets(st.integers(5, 400), min_size=20, max_size=60).map(sorted),
    "bad_words": st.lists(st.sampled_from(["the", "return", " a", "\n\n"[:1] + "x"]), max_size=3),
    "stop": st.one_of(st.sampled_from(["e", " the", "\n"]), st.lists(st.sampled_from(["re", ")", "☃"]), max_size=3)),
    "stop_token_ids": st.lists(st.integers(5, 300), max_size=20),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 3),
    "max_tokens": st.integers(3, MAX_TOKENS),
    "n": st.integers(1, 3),
    "prompt_logprobs": st.integers(0, 3),
    "truncate_prompt_tokens": st.sampled_from([-1, 1, 3, 100]),
    "truncation_side": st.sampled_from(["left", "right"]),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "return_routed_experts": st.booleans(),
    "capacity": st.sampled_from(["exact", "best_effort"]),
    "priority": st.just(0),
    "cache_salt": st.sampled_from(["a", "b"]),
}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Any of `OPTIONS`, a structure or none, and a seed, so that the same request gives the same tokens."""
    drawn = draw(st.fixed_dictionaries({"seed": st.integers(0, 2**31)}, optional=OPTIONS))
    # At most one of what leaves few tokens: together they may leave none, which is an error of its own.
    if draw(st.integers(0, 2)) == 0:
        for name in ("allowed_token_ids", "logit_bias", "bad_words"):
            drawn.pop(name, None)
        drawn |= draw(st.sampled_from(STRUCTURES))
    return drawn


def read_events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which has ended as it should."""
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""], answer.text
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def extend(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part of a choice to what has come of it before, as every client does: text, lists and objects grow."""
    for name, value in part.items():
        before = whole.get(name)
        if before is None or value is None or name == "index":
            whole[name] = before if value is None else value
        elif isinstance(value, dict):
            extend(before, value)
        else:
            whole[name] = before + value


def counts(usage: dict[str, Any]) -> dict[str, Any]:
    """The part of `usage` that does not depend on what the prefix cache has kept."""
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
