"""How a request says what shape its text must have: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_GRAMMAR_CHARS = 65_536
MAX_REGEX_CHARS = 16_384
MAX_CHOICE_STRINGS = 4_096

_Schema = dict[str, Any]


class JsonSchemaFormat(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    json_schema: _Schema = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = Field(
        None,
        description="false: keywords of the schema that cannot be enforced are left out, instead of refused.",
    )


class ResponseFormat(BaseModel):
    """OpenAI's way to ask for structured output. JSON is written compactly, without white space between its parts."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {"$ref": "#/components/schemas/JsonSchemaFormat"},
                    },
                    "required": ["type", "json_schema"],
                },
            ]
        },
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and with no other")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's way to ask for structured output: exactly one of json, regex, choice, grammar and json_object."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"oneOf": [{"required": [name]} for name in ("json", "regex", "choice", "grammar")]},
    )

    json_: _Schema | str | None = Field(None, alias="json", description="A JSON schema, as an object or as text.")
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)] | None = Field(
        None, description="The whole text matches it. Without look-around and back-references."
    )
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICE_STRINGS, fail_fast=True),
        ]
        | None
    ) = Field(None, description="The text is one of these.")
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = Field(
        None, description="A context-free grammar: Lark's notation (start: ...), or GBNF (root ::= ...)."
    )
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    disable_any_whitespace: bool | None = Field(
        None, description="Without effect: JSON never has white space between its parts."
    )

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        given = [name for name, value in self.wanted().items() if value is not None]
        if len(given) != 1:
            shown = ", ".join(given) or "none"
            raise ValueError(f"exactly one of json, regex, choice, grammar and json_object is needed, not {shown}")
        return self

    def wanted(self) -> dict[str, Any]:
        """The five ways by the names that clients know; one is not None."""
        return {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object,
        }
