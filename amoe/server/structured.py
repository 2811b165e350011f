"""Structured output: from what a request says its text must be to a grammar that the sampler enforces.

The grammar is llguidance's own serialised form. It has been compiled once before a worker sees it, aside
(`grammar_check`), so that a worker never fails on it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, gbnf_to_lark

from amoe.errors import RequestError
from amoe.server.closed_schema import closed_schema
from amoe.server.structured_schemas import MAX_GRAMMAR_CHARS, JsonSchemaFormat, StructuredOutputs

if TYPE_CHECKING:
    from amoe.server.context import ServerContext
    from amoe.server.schemas import GenerationRequest

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

# Possessive, and within a line: a hostile text of spaces must not be read again from each of them.
_GBNF_RULE = re.compile(r"^[ \t]*+[A-Za-z_][\w-]*+[ \t]*+::=", re.MULTILINE)


async def requested_grammar(context: ServerContext, request: GenerationRequest) -> str | None:
    """The grammar that `request` asks for; None: any text will do.

    Raises:
        RequestError: naming the field, with the compiler's words.
    """
    wanted = _wanted(request)
    if wanted is None:
        return None
    param, make = wanted
    return await checked_grammar(context, make, param)


async def checked_grammar(context: ServerContext, make: Callable[[], str], param: str) -> str:
    """What `make` makes, once it has been compiled aside. `make` runs in a thread, and may raise ValueError.

    Raises:
        RequestError: naming `param`.
    """
    try:
        grammar = await asyncio.to_thread(make)
    except (ValueError, gbnf_to_lark.GbnfToLarkError) as error:
        raise RequestError(f"{param}: {error}", param=param) from error
    except RecursionError as error:
        raise RequestError(f"{param} is nested too deeply", param=param) from error
    complaint = await context.check_grammar(grammar)
    if complaint is not None:
        raise RequestError(f"{param}: {complaint}", param=param)
    return grammar


def _wanted(request: GenerationRequest) -> tuple[str, Callable[[], str]] | None:
    """The field that says it, and how its grammar is made."""
    if request.structured_outputs is not None:
        return _of_structured_outputs(request.structured_outputs)
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return None
    schema = response_format.json_schema
    if schema is None:
        return "response_format", lambda: json_schema_grammar(ANY_OBJECT)
    return "response_format.json_schema.schema", lambda: _of_named_schema(schema)


def _of_named_schema(schema: JsonSchemaFormat) -> str:
    return json_schema_grammar(schema.json_schema, lenient=schema.strict is False)


def _of_structured_outputs(outputs: StructuredOutputs) -> tuple[str, Callable[[], str]]:
    makers: dict[str, Callable[[Any], str]] = {
        "json": _of_json,
        "regex": LLMatcher.grammar_from_regex,
        "choice": choice_grammar,
        "grammar": context_free_grammar,
        "json_object": lambda _: json_schema_grammar(ANY_OBJECT),
    }
    name, value = next((name, value) for name, value in outputs.wanted().items() if value is not None)
    return f"structured_outputs.{name}", lambda: makers[name](value)


def _of_json(schema: Mapping[str, Any] | str) -> str:
    if not isinstance(schema, str):
        return json_schema_grammar(schema)
    try:
        parsed = json.loads(schema)
    except json.JSONDecodeError as error:
        raise ValueError(f"the text is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("the text must hold a JSON object")
    return json_schema_grammar(parsed)


def json_schema_grammar(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """JSON that follows `schema`: with no white space between its parts, and no property that it does not name. A small
    model could add either for ever.

    Args:
        lenient: leave out keywords that cannot be enforced.

    Raises:
        ValueError: the schema is too large.
    """
    text = json.dumps(closed_schema(schema), ensure_ascii=False)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"the schema has {len(text)} characters, and {MAX_GRAMMAR_CHARS} is the limit")
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False, "lenient": lenient})


def choice_grammar(choices: Sequence[str]) -> str:
    """One of `choices`.

    Raises:
        ValueError: they are too large.
    """
    size = sum(map(len, choices))
    if size > MAX_GRAMMAR_CHARS:
        raise ValueError(f"the choices have {size} characters, and {MAX_GRAMMAR_CHARS} is the limit")
    # One terminal: as alternatives of a rule, many of them would exceed what the parser takes at once.
    terminal = " | ".join(json.dumps(choice) for choice in choices)
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {terminal}")


def context_free_grammar(text: str) -> str:
    """A grammar in the notation of Lark, or of llama.cpp (GBNF), which is told by its `::=`."""
    return LLMatcher.grammar_from_lark(_of_gbnf(text) if _GBNF_RULE.search(text) else text)


def _of_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark.gbnf_to_lark(text)
    except (gbnf_to_lark.GbnfToLarkError, RecursionError):
        raise
    except IndexError as error:  # how the converter meets an escape sequence that breaks off
        raise ValueError("the grammar breaks off") from error
    except Exception as error:  # of no class of its own: a rule that is nowhere
        raise ValueError(str(error)) from error
