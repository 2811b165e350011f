"""Bodies of POST /v1/messages and /v1/messages/count_tokens, Anthropic's API. Fields of amoe that are not here (`seed`,
`min_p`, ...) are those of chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from amoe.errors import RequestError
from amoe.server.chat_schemas import MAX_MESSAGES, MAX_TOOLS, TOOL_NAME
from amoe.server.field_types import MAX_STOP_CHARS, MAX_STOP_STRINGS
from amoe.server.schemas import MAX_TOKENS, null_means

Block = dict[str, Any]


def _parse_content(value: Any) -> str | list[Block]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(block, dict) for block in value):
        return value
    raise ValueError("must be a string or a list of content blocks")


# What is understood of blocks is told by `blocks`, of tools and their choice by `translate`: here only as much as helps
# a reader to write a request that is served.
_TEXT: JsonDict = {"type": "string", "minLength": 1}
_CONTENT: JsonDict = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "description": "tool_result, tool_use, thinking and redacted_thinking are blocks as well.",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": _TEXT},
            },
        },
    ]
}
_HAS_NAME: JsonDict = {"required": ["name"]}
_NAMES_TOOL: JsonDict = {
    "anyOf": [
        {"properties": {"type": {"enum": ["auto", "any", "none"]}}},
        {"required": ["name"], "properties": {"name": {"type": "string"}}},
    ]
}
_PARAMETERS: JsonDict = {"type": "object", "properties": {"type": {"const": "object"}}}

Content = Annotated[str | list[Block], PlainValidator(_parse_content), WithJsonSchema(_CONTENT)]
StopSequence = Annotated[str, WithJsonSchema({**_TEXT, "maxLength": MAX_STOP_CHARS})]


class MessageParam(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolParam(BaseModel):
    """A tool. Types other than `custom` are Anthropic's own, and skipped: agents offer them to every server."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_HAS_NAME)

    type: Annotated[str, null_means("custom")] = "custom"
    name: Annotated[str | None, WithJsonSchema({"type": "string", "pattern": TOOL_NAME})] = None
    description: str | None = None
    input_schema: Annotated[dict[str, Any] | None, WithJsonSchema(_PARAMETERS)] = None
    strict: bool | None = None

    @property
    def is_function(self) -> bool:
        """It can be called here."""
        return self.type == "custom"


class ToolChoiceParam(BaseModel):
    """Whether a tool is to be called, and which."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_NAMES_TOOL)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Annotated[bool, null_means(False)] = False

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoiceParam:
        if self.type == "tool" and self.name is None:
            raise RequestError("tool_choice.name is missing", param="tool_choice.name")
        return self


class ThinkingParam(BaseModel):
    """Whether the model thinks before it answers."""

    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="A target that the model is not told, and not held to; max_tokens bounds thoughts and answer."
    )


class OutputFormatParam(BaseModel):
    """What the text must be."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfigParam(BaseModel):
    """How much effort the answer is worth, and what it must be."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None
    format: OutputFormatParam | None = None


class MessagesPrompt(BaseModel):
    """What the prompt is made of; the body of POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Annotated[Content, Field(description="A string, or text blocks.")] | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True), null_means([])] = []
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfigParam | None = None


class MessagesRequest(MessagesPrompt):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stream: Annotated[bool, null_means(False)] = False
    stop_sequences: Annotated[
        list[StopSequence], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), null_means([])
    ] = []
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    metadata: dict[str, Any] | None = Field(None, description="For the client's own records.")
    request_id: str | None = Field(None, max_length=256, description="Becomes part of the message's id.")

    @model_validator(mode="after")
    def _check_budget(self) -> MessagesRequest:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise RequestError(
                "thinking.budget_tokens must be less than max_tokens, which bounds thoughts and answer together",
                param="thinking.budget_tokens",
            )
        return self
