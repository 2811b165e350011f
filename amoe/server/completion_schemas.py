"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from amoe.server.field_types import Prompts, null_means
from amoe.server.schemas import GenerationRequest
from amoe.types import SamplingParams


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts = Field(description="Text or token ids; a list of either: several prompts.")
    echo: Annotated[bool, null_means(False)] = Field(False, description="The prompt comes before the text.")
    logprobs: Annotated[int, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] | None = Field(
        None, description="Log-probabilities of the tokens, with the k best; with echo, of the prompt's tokens too."
    )
    add_special_tokens: Annotated[bool, null_means(True)] = Field(
        True, description="Put around a prompt's text what the model expects there."
    )
