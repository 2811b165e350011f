"""Body of POST /v1/responses. Fields of amoe that are not here (`top_k`, `seed`, ...) are those of chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict

from amoe.errors import RequestError
from amoe.server.chat_schemas import MAX_MESSAGES, MAX_TOOLS, TOOL_NAME
from amoe.server.schemas import null_means
from amoe.types import SamplingParams

MAX_METADATA_PAIRS = 16
MAX_METADATA_CHARS = 512  # of a value, as OpenAI's: it comes back with every event that has the response
LOGPROBS_INCLUDED = "message.output_text.logprobs"

Item = dict[str, Any]


def _parse_input(value: Any) -> str | list[Item]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be a string or a list of items")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"must hold at most {MAX_MESSAGES} items")
    return value


def _parse_tools(value: Any) -> list[dict[str, Any]]:
    tools = [] if value is None else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("must be a list of objects")
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"must hold at most {MAX_TOOLS} tools")
    if not all(isinstance(tool.get("type"), str) for tool in tools):
        raise ValueError("every tool needs a type, such as 'function'")
    return tools


def _check_metadata(value: Any) -> Any:
    """Before each pair is looked at, since each would have a complaint of its own."""
    if isinstance(value, dict) and len(value) > MAX_METADATA_PAIRS:
        raise ValueError(f"must hold at most {MAX_METADATA_PAIRS} pairs")
    return value


_MESSAGE: JsonDict = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["user", "system", "developer", "assistant"]},
        "content": {"type": "string", "minLength": 1},
    },
}
_CALL_OUTPUT: JsonDict = {
    "type": "object",
    "description": "What a function has returned; function_call, reasoning and item_reference are items as well.",
    "required": ["type", "call_id", "output"],
    "properties": {
        "type": {"const": "function_call_output"},
        "call_id": {"type": "string", "minLength": 1},
        "output": {"type": "string"},
    },
}
# What is understood of items and tools is told by `items` and `translate`: here only as much as helps a reader.
_INPUT: JsonDict = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": {"anyOf": [_MESSAGE, _CALL_OUTPUT]}},
    ]
}
_TOOLS: JsonDict = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "description": "Types other than function are skipped.",
                "required": ["type", "name"],
                "properties": {
                    "type": {"const": "function"},
                    "name": {"type": "string", "pattern": TOOL_NAME},
                    "description": {"type": "string"},
                    "parameters": {"type": "object"},
                    "strict": {"type": "boolean"},
                },
            },
        },
        {"type": "null"},
    ]
}
Input = Annotated[str | list[Item], PlainValidator(_parse_input), WithJsonSchema(_INPUT)]
Tools = Annotated[list[dict[str, Any]], PlainValidator(_parse_tools), WithJsonSchema(_TOOLS)]
Metadata = Annotated[
    dict[str, Annotated[str, Field(max_length=MAX_METADATA_CHARS)]],
    Field(max_length=MAX_METADATA_PAIRS),
    BeforeValidator(_check_metadata),
    null_means({}),
]


class TextFormat(BaseModel):
    """What the text must look like; a JSON schema lies flat, not in an object of its own as in chat completions."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema":
            for key, value in (("name", self.name), ("schema", self.json_schema)):
                if value is None:
                    raise RequestError(f"text.format.{key} is missing", param=f"text.format.{key}")
        return self

    def as_json(self) -> dict[str, Any]:
        """As in the response."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "schema": self.json_schema,
            "strict": bool(self.strict),
        }


class TextConfig(BaseModel):
    """How text comes out."""

    model_config = ConfigDict(extra="allow")

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(BaseModel):
    """How much the model thinks, and whether a summary of it is wanted."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Any value: the thoughts themselves stand in for a summary; nothing here writes one."
    )


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: Input
    instructions: str | None = None
    previous_response_id: str | None = None
    store: Annotated[bool, null_means(True)] = True
    background: Annotated[bool, null_means(False)] = False
    stream: Annotated[bool, null_means(False)] = False
    stream_options: dict[str, Any] | None = Field(None, description="Without effect: nothing is obfuscated.")
    tools: Tools = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Annotated[bool, null_means(True)] = True
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Without effect: it counts calls of built-in tools, and there are none."
    )
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: Annotated[float, null_means(0.0)] = 0.0
    frequency_penalty: Annotated[float, null_means(0.0)] = 0.0
    top_logprobs: Annotated[int, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] | None = None
    include: Annotated[list[str], Field(fail_fast=True), null_means([])] = Field(
        [], description=f"{LOGPROBS_INCLUDED}; others have nothing to include here."
    )
    text: Annotated[TextConfig, null_means(TextConfig())] = TextConfig()
    reasoning: Annotated[ReasoningConfig, null_means(ReasoningConfig())] = ReasoningConfig()
    truncation: Annotated[Literal["auto", "disabled"], null_means("disabled")] = Field(
        "disabled", description="auto: accepted, but an input that does not fit is refused all the same."
    )
    metadata: Metadata = Field({}, description="For the client's own records.")
    user: str | None = Field(None, description="For the client's own records.")
    safety_identifier: str | None = Field(None, description="For the client's own records.")
    prompt_cache_key: str | None = Field(None, description="Without effect: the prefix cache needs no hint.")
    service_tier: str | None = Field(None, description="Without effect: there is one.")
    request_id: str | None = Field(None, max_length=256, description="Becomes part of the response's id.")

    @model_validator(mode="after")
    def _check_background(self) -> ResponsesRequest:
        if self.background and not self.store:
            raise RequestError("background needs store=true: else nobody could fetch the response", param="background")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Log-probabilities come with the text."""
        return LOGPROBS_INCLUDED in self.include or bool(self.top_logprobs)
