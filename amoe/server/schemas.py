"""Fields that all generation endpoints share. What is not here is refused (see `fields`) or unknown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from amoe.errors import RequestError
from amoe.server.field_types import (
    AllowedIds,
    BadWords,
    LogitBias,
    Seed,
    Spans,
    Stop,
    StopTokenIds,
    null_means,
)
from amoe.server.structured_schemas import ResponseFormat, StructuredOutputs
from amoe.types import CapacityChoice, SamplingParams

MAX_CHOICES = 128
MAX_PRIORITY = 2**31 - 1
MAX_TOKENS = 2**31 - 1


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("0 would leave nothing of the prompt")
    return value


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(extra="allow")

    include_usage: Annotated[bool, null_means(False)] = False
    continuous_usage_stats: Annotated[bool, null_means(False)] = False


class GenerationRequest(BaseModel):
    """Fields that all endpoints share. null is the default everywhere."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="A served name; left out: the first one.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), null_means(1)] = Field(1, description="Choices for each prompt.")
    stream: Annotated[bool, null_means(False)] = Field(False, description="Server-sent events instead of one answer.")
    stream_options: StreamOptions | None = Field(None, description="Goes with stream=true only.")
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="Tokens to generate at most; 0 goes with log-probabilities of the prompt only."
    )
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), null_means(0)] = Field(
        0, description="No end of text, stop token or stop string before so many tokens."
    )
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="0 is greedy. Left out: the checkpoint's own, else 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Left out: the checkpoint's, else 1.")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="0 and -1: off. Left out: the checkpoint's own, else off."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Left out: the checkpoint's, else 0.")
    seed: Seed | None = Field(None, description="The same seed gives the same tokens, whatever else the server does.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2), null_means(0.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), null_means(0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Over prompt and generated tokens. Left out: the checkpoint's own, else 1."
    )
    logit_bias: LogitBias = Field((), description='Added to the logits: {"token id": bias in [-100, 100]}.')
    allowed_token_ids: AllowedIds = Field((), description="Nothing else is sampled.")
    bad_words: BadWords = Field((), description="None of these is generated, at a text's start or after a space.")
    stop: Stop = Field((), description="Strings that end the text.")
    stop_token_ids: StopTokenIds = Field((), description="Tokens that end the text.")
    include_stop_str_in_output: Annotated[bool, null_means(False)] = False
    skip_special_tokens: Annotated[bool, null_means(True)] = True
    spaces_between_special_tokens: Annotated[bool, null_means(True)] = Field(
        True, description="Without effect: fast tokenizers, the only ones here, put no spaces there."
    )
    ignore_eos: Annotated[bool, null_means(False)] = Field(False, description="Go on after the end-of-text token.")
    response_format: ResponseFormat | None = Field(None, description="What the text must be, as OpenAI says it.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the text must be, as vLLM says it.")
    prompt_logprobs: Annotated[int, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] | None = Field(
        None, description="Log-probabilities of the prompt's tokens, with the k best. Of several choices, the first's."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS), AfterValidator(_not_zero)] | None = Field(
        None, description="Keep so many tokens of the prompt; -1: as many as fit beside max_tokens."
    )
    truncation_side: Annotated[Literal["left", "right"], null_means("left")] = Field(
        "left", description="The side of the prompt that truncate_prompt_tokens takes away."
    )
    return_token_ids: Annotated[bool, null_means(False)] = Field(
        False, description="Tell prompt_token_ids, and token_ids of every choice or part of one."
    )
    return_tokens_as_token_ids: Annotated[bool, null_means(False)] = Field(
        False, description='Log-probabilities name tokens as "token_id:123".'
    )
    return_routed_experts: Annotated[bool, null_means(False)] = Field(
        False,
        description="Tell routed_experts of every choice, in its last part: base64 of a .npy file, int16 "
        "[num_tokens, num_moe_layers, experts_per_token], for each token that went through the model.",
    )
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), null_means(0)] = Field(
        0, description="Less is served first. Other than 0 only where the server schedules by priority."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=SamplingParams.MAX_SALT_CHARS)] | None = Field(
        None, description="The prefix cache is shared with requests of the same salt only."
    )
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

    @model_validator(mode="after")
    def _check_structure(self) -> GenerationRequest:
        if self.structured_outputs is not None and self.response_format is not None:
            raise RequestError(
                "structured_outputs and response_format both say what the text must be: send one of them",
                param="structured_outputs",
            )
        return self

    @property
    def include_usage(self) -> bool:
        """A last chunk tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Every chunk tells the usage so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats
