"""Fields of the generation endpoints, and /v1/completions. What is not here is refused (see `fields`) or unknown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from amoe.errors import RequestError
from amoe.types import CapacityChoice

MAX_CHOICES = 128
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1024


def null_means(value: Any) -> BeforeValidator:
    """null means the default `value`, as in OpenAI's API."""

    def choose(given: Any) -> Any:
        return value if given is None else given

    return BeforeValidator(choose)


def _parse_stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(entry, str) for entry in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS or any(len(entry) > MAX_STOP_CHARS for entry in strings):
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings of at most {MAX_STOP_CHARS} characters")
    if any("\ud800" <= char <= "\udfff" for entry in strings for char in entry):
        raise ValueError("must be valid Unicode, without halves of surrogate pairs")
    return tuple(strings)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """One entry per prompt."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if all(isinstance(entry, str) for entry in value) or all(_is_ids(entry) for entry in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _parse_spans(value: Any) -> tuple[tuple[int, int], ...]:
    spans = [] if value is None else value
    if not isinstance(spans, list) or not all(_is_ids(span) and len(span) == 2 for span in spans):
        raise ValueError("must be a list of [start, end] pairs of token positions, such as [[0, 16], [20, 24]]")
    return tuple((start, end) for start, end in spans)


Stop = Annotated[tuple[str, ...], PlainValidator(_parse_stop, json_schema_input_type=str | list[str] | None)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
StopTokenIds = Annotated[tuple[int, ...], null_means(())]
Spans = Annotated[
    tuple[tuple[int, int], ...], PlainValidator(_parse_spans, json_schema_input_type=list[list[int]] | None)
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(extra="allow")

    include_usage: Annotated[bool, null_means(False)] = False
    continuous_usage_stats: Annotated[bool, null_means(False)] = False


class GenerationRequest(BaseModel):
    """Fields that both endpoints share. null is the default everywhere."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), null_means(1)] = 1
    stream: Annotated[bool, null_means(False)] = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: Annotated[int, null_means(0)] = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Seed | None = None
    presence_penalty: Annotated[float, null_means(0.0)] = 0.0
    frequency_penalty: Annotated[float, null_means(0.0)] = 0.0
    repetition_penalty: float | None = None
    stop: Stop = ()
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: Annotated[bool, null_means(False)] = False
    skip_special_tokens: Annotated[bool, null_means(True)] = True
    spaces_between_special_tokens: Annotated[bool, null_means(True)] = Field(
        True, description="Without effect: fast tokenizers, the only ones here, put no spaces there."
    )
    ignore_eos: Annotated[bool, null_means(False)] = False
    capacity: Annotated[CapacityChoice, null_means("best_effort")] = Field(
        "best_effort",
        description="exact: no pair of this request is dropped or rerouted, whatever the server is set to.",
    )
    droppable_spans: Spans = Field(
        (), description="[start, end) positions of the tokenized prompt whose tokens lose pairs before all others do."
    )
    user: str | None = Field(None, description="For the client's own records.")
    request_id: str | None = Field(None, max_length=256, description="Becomes part of the response's id.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream=true only", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """A last chunk tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Every chunk tells the usage so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts
    echo: Annotated[bool, null_means(False)] = False
    logprobs: int | None = None
    add_special_tokens: Annotated[bool, null_means(True)] = True
