"""Tools of a request: which may be called, whether one must be, and the grammar that holds the model to it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema
import jsonschema.exceptions

from amoe.errors import RequestError
from amoe.server.chat_schemas import ChatPrompt, FunctionDefinition, Tool
from amoe.server.closed_schema import closed_schema
from amoe.server.parsers.formats import ToolFormat

# Arguments as models write them: one space after a comma and a colon, none that a small model could add for ever.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_SCHEMA_CHARS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolPlan:
    """What a request says about tools.

    Attributes:
        mode: `none`: nothing is looked for, and nothing is called.
        functions: that may be called, each with its position among the request's tools.
        parallel: several may be called at once.
    """

    mode: Literal["none", "auto", "required", "named"] = "none"
    functions: tuple[tuple[int, FunctionDefinition], ...] = ()
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions that may be called."""
        return frozenset(function.name for _, function in self.functions)

    @property
    def is_forced(self) -> bool:
        """A function must be called: the answer is calls and nothing else, thoughts aside."""
        return self.mode in ("required", "named")

    @property
    def strict(self) -> tuple[tuple[int, FunctionDefinition], ...]:
        """Functions whose arguments are held to their schema even where calling is free."""
        return tuple((index, function) for index, function in self.functions if function.strict)

    def for_template(self) -> list[dict[str, Any]] | None:
        """Tools as templates want them: OpenAI's form."""
        tools = [
            {"type": "function", "function": function.model_dump(exclude_unset=True, exclude_none=True)}
            for _, function in self.functions
        ]
        return tools or None


def plan_tools(body: ChatPrompt, *, parallel: bool = True) -> ToolPlan:
    """Read `tools` and `tool_choice`.

    Raises:
        RequestError: naming what is wrong with them.
    """
    functions = _functions(body.tools or [])
    choice = body.tool_choice
    mode = choice.mode if choice is not None else "auto"
    if mode in ("required", "named") and not functions:
        raise RequestError("tool_choice asks for a call, but tools holds no function", param="tool_choice")
    if mode == "none" or not functions:
        # The template does not hear of tools that must not be called.
        return ToolPlan()
    if choice is not None and choice.names is not None:
        unknown = [name for name in choice.names if all(function.name != name for _, function in functions)]
        if unknown:
            raise RequestError(f"tool_choice names {unknown[0]!r}, which is not among tools", param="tool_choice")
        functions = [(index, function) for index, function in functions if function.name in choice.names]
        if not functions:
            raise RequestError("tool_choice allows no function at all", param="tool_choice")
    return ToolPlan(mode=mode, functions=tuple(functions), parallel=parallel)


def _functions(tools: Sequence[Tool]) -> list[tuple[int, FunctionDefinition]]:
    found = []
    for index, tool in enumerate(tools):
        if tool.type != "function":
            continue
        if tool.function is None:
            raise RequestError(f"tools.{index}.function is missing", param=f"tools.{index}.function")
        _check_parameters(tool.function.parameters, f"tools.{index}.function.parameters")
        found.append((index, tool.function))
    return found


def _check_parameters(schema: Mapping[str, Any] | None, where: str) -> None:
    if schema is None:
        return
    if schema.get("type", "object") != "object":
        raise RequestError(f"{where} must be a schema of type 'object', not {schema['type']!r}", param=where)
    complaint = _schema_complaint(json.dumps(schema))
    if complaint is not None:
        raise RequestError(f"{where} is no valid JSON schema: {complaint}", param=where)


@functools.lru_cache(maxsize=1024)  # agents send the same tools with every request
def _schema_complaint(text: str) -> str | None:
    """What is wrong with a schema."""
    if len(text) > MAX_SCHEMA_CHARS:
        return f"it has {len(text)} characters, and {MAX_SCHEMA_CHARS} is the limit"
    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(text))
    except jsonschema.exceptions.SchemaError as error:
        path = ".".join(str(part) for part in error.absolute_path)
        return f"{path}: {error.message}" if path else error.message
    except RecursionError:
        return "it is nested too deeply"
    return None


def arguments_schema(function: FunctionDefinition) -> dict[str, Any]:
    """The schema that the arguments of `function` are held to: no others than it names, unless it says so itself.
    Keywords that cannot be enforced are left out, unless the function is `strict`."""
    parameters = closed_schema(function.parameters or {"properties": {}})
    return {**parameters, "type": "object", "x-guidance": {**SPACING, "lenient": not function.strict}}


def argument_rules(functions: Sequence[tuple[int, FunctionDefinition]]) -> str:
    """A Lark rule for the arguments of each function, `arguments_0` and so on."""
    schemas = (json.dumps(arguments_schema(function), ensure_ascii=False) for _, function in functions)
    return "".join(f"arguments_{number}: %json {schema}\n" for number, schema in enumerate(schemas))


def call_rules(plan: ToolPlan, format_: ToolFormat, special_ids: Mapping[str, int]) -> str:
    """Lark rules: `calls` is what the model must write to call one function, or several.

    Args:
        special_ids: marks of the format that are special tokens of the model.
    """
    alternatives = []
    for number, (_, function) in enumerate(plan.functions):
        head = f'{{"name": {json.dumps(function.name)}, "arguments": '
        alternatives.append(f'{json.dumps(head)} arguments_{number} "}}"')
    # OpenAI's: a function that is named is called once.
    one = not plan.parallel or plan.mode == "named"
    return "".join(
        [
            f"calls: {'block' if one else 'many'}\n",
            f"call: {' | '.join(alternatives)}\n",
            format_.rules(lambda text: mark(text, special_ids)),
            argument_rules(plan.functions),
        ]
    )


def mark(text: str, special_ids: Mapping[str, int]) -> str:
    """A mark in Lark: its token, if it is a special one, else its text."""
    token_id = special_ids.get(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"
