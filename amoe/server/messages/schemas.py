"""Bodies of POST /v1/messages and /v1/messages/count_tokens, Anthropic's API. Fields of amoe that are not here (`seed`,
`min_p`, ...) are those of chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from amoe.errors import RequestError
from amoe.server.chat_schemas import MAX_MESSAGES, MAX_TOOLS
from amoe.server.field_types import MAX_STOP_STRINGS
from amoe.server.schemas import null_means

Block = dict[str, Any]


def _parse_content(value: Any) -> str | list[Block]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(block, dict) for block in value):
        return value
    raise ValueError("must be a string or a list of content blocks")


Content = Annotated[
    str | list[Block], PlainValidator(_parse_content, json_schema_input_type=str | list[dict[str, Any]])
]


class MessageParam(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolParam(BaseModel):
    """A tool. Types other than `custom` are Anthropic's own, and skipped: agents offer them to every server."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, null_means("custom")] = "custom"
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def is_function(self) -> bool:
        """It can be called here."""
        return self.type == "custom"


class ToolChoiceParam(BaseModel):
    """Whether a tool is to be called, and which."""

    model_config = ConfigDict(extra="allow")

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

    max_tokens: Annotated[int, Field(ge=1)]
    stream: Annotated[bool, null_means(False)] = False
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), null_means([])] = []
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
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
