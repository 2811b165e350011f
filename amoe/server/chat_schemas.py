"""What a conversation looks like in a request: messages, tools, how the prompt is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from amoe.errors import RequestError
from amoe.server.schemas import MAX_TOKENS, GenerationRequest, null_means
from amoe.types import SamplingParams

MAX_TOOLS = 512
MAX_CALLS = 1024  # of one message
MAX_MESSAGES = 4096  # twice what OpenAI takes: each costs the event loop some time
TOOL_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"

Content = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


_ROLES = ("system", "developer", "user", "assistant", "tool")
# Only an assistant may say nothing, which pydantic has no words for.
_HAS_CONTENT: JsonDict = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
    ]
}


class ChatMessage(BaseModel):
    """One message. Other keys (`name`, ...) reach the chat template as they are."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_HAS_CONTENT)

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        WithJsonSchema({"type": "string", "enum": list(_ROLES)}),
    ]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="Of the assistant: what it has called."
    )
    tool_call_id: str | None = Field(None, description="Of a tool: the call that this is the result of.")
    reasoning: str | None = Field(None, description="Of the assistant: what it thought; also reasoning_content.")
    reasoning_content: str | None = None


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments, an object.")
    strict: bool | None = Field(None, description="Arguments are held to the schema by a grammar in `auto` too.")


class Tool(BaseModel):
    """A tool. Types other than `function` are skipped, since agents offer them to every server."""

    model_config = ConfigDict(extra="allow")

    type: str = "function"
    function: FunctionDefinition | None = None

    @model_validator(mode="before")
    @classmethod
    def _skip_other_types(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "function":
            return {"type": value["type"]}
        return value


class ToolChoice(BaseModel):
    """Whether a tool is to be called, and which.

    Attributes:
        mode: `none`: no call; `auto`: the model decides; `required`: a call at least; `named`: of `names[0]`.
        names: functions that may be called; None: all.
    """

    mode: Literal["none", "auto", "required", "named"]
    names: tuple[str, ...] | None = None


def _named(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise ValueError('a function is named as {"type": "function", "function": {"name": ...}}')
    return name


def _parse_tool_choice(value: Any) -> ToolChoice | None:
    if value is None or isinstance(value, ToolChoice):
        return value
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return ToolChoice(mode=value)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise ValueError("must be none, auto, required, or an object that names a function")
    if value.get("type") != "allowed_tools":
        return ToolChoice(mode="named", names=(_named(value),))
    allowed = value.get("allowed_tools")
    allowed = allowed if isinstance(allowed, dict) else value
    mode, tools = allowed.get("mode", "auto"), allowed.get("tools")
    if mode not in ("auto", "required") or not isinstance(tools, list):
        raise ValueError("allowed_tools needs a mode, auto or required, and a list of tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("allowed_tools.tools must be a list of objects that name a function")
    return ToolChoice(mode=mode, names=tuple(_named(tool) for tool in tools if tool.get("type") == "function"))


_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}


Choice = Annotated[ToolChoice | None, PlainValidator(_parse_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)]


class ChatPrompt(BaseModel):
    """What the prompt of a conversation is made of; whatever reads a conversation has these fields."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[
        ToolChoice | None, PlainValidator(_parse_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)
    ] = Field(None, description="Default: auto with tools, none without.")
    add_generation_prompt: Annotated[bool, null_means(True)] = True
    continue_final_message: Annotated[bool, null_means(False)] = Field(
        False, description="The model goes on where the last message ends; with add_generation_prompt=false only."
    )
    add_special_tokens: Annotated[bool, null_means(False)] = False
    chat_template: str | None = Field(
        None, description="Instead of the checkpoint's own; if the server trusts its clients with that."
    )
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _check_continuation(self) -> ChatPrompt:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message goes with add_generation_prompt=false only", param="continue_final_message"
            )
        return self


class ChatCompletionRequest(ChatPrompt, GenerationRequest):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[bool, null_means(False)] = False
    top_logprobs: Annotated[int, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] | None = None
    echo: Annotated[bool, null_means(False)] = Field(False, description="The last message's text comes first.")
    include_reasoning: Annotated[bool, null_means(True)] = Field(True, description="false: no thoughts in the answer.")
    parallel_tool_calls: Annotated[bool, null_means(True)] = Field(True, description="false: one call at most.")
    service_tier: str | None = Field(None, description="Without effect: there is one.")
    store: bool | None = Field(None, description="Without effect: chat completions are not stored.")
    metadata: dict[str, Any] | None = Field(None, description="For the client's own records.")
    prompt_cache_key: str | None = Field(None, description="Without effect: the prefix cache needs no hint.")
    safety_identifier: str | None = Field(None, description="For the client's own records.")

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs=true only", param="top_logprobs")
        return self
