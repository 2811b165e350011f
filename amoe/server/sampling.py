"""From request fields to `SamplingParams`; what a request leaves open comes from the checkpoint, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amoe.engine.tokenizer import read_json
from amoe.errors import CheckpointError, RequestError
from amoe.types import SamplingParams

if TYPE_CHECKING:
    from amoe.server.schemas import GenerationRequest

MAX_SEED = 2**63


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """Values of fields that a request leaves out. OpenAI's, unless the checkpoint brings its own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> SamplingDefaults:
        """From generation_config.json, if there is one.

        Raises:
            CheckpointError: if a value in it cannot be used.
        """
        file = Path(path) / "generation_config.json"
        content = read_json(file)
        values = {name: content[name] for name in asdict(cls()) if content.get(name) is not None}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{file}: {name} must be a number, not {value!r}")
        if not isinstance(values.get("top_k", 0), int):
            raise CheckpointError(f"{file}: top_k must be a whole number, not {values['top_k']!r}")
        try:
            SamplingParams(**values)
        except RequestError as error:
            raise CheckpointError(f"{file}: {error}") from error
        return cls(**values)

    def changed(self) -> dict[str, float]:
        """The values that are not OpenAI's."""
        plain = asdict(SamplingDefaults())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """What the tokens of a request are held to, in the words of the workers; see `amoe.server.constraints`."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None


def check_spans(request: GenerationRequest, prompt_lens: Sequence[int]) -> None:
    """Refuse spans that no tokenized prompt has.

    Args:
        prompt_lens: tokens of each prompt of `request`.

    Raises:
        RequestError: naming the field.
    """
    if not request.droppable_spans:
        return
    if len(prompt_lens) > 1:
        raise RequestError(
            "droppable_spans count the tokens of one prompt: send each prompt in a request of its own",
            param="droppable_spans",
        )
    end = max(end for _, end in request.droppable_spans)
    if end > prompt_lens[0]:
        raise RequestError(
            f"droppable_spans reach to token {end}, but the prompt has only {prompt_lens[0]} tokens",
            param="droppable_spans",
        )


def sampling_params(
    request: GenerationRequest,
    defaults: SamplingDefaults,
    max_tokens: int,
    logprobs: int | None,
    choice: int,
    *,
    constraints: Constraints,
    echo_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of the sequence for choice number `choice` of `request`.

    Args:
        logprobs: best tokens to tell at every position; None: no log-probabilities.
        constraints: what `constraints_of` made of the request.
        echo_logprobs: best tokens to tell at every position of a prompt that is echoed.

    Raises:
        RequestError: naming the field that is out of range.
    """
    seed = request.seed
    if seed is not None:  # choices differ, reproducibly, and the sum stays a 64-bit number
        seed = (seed + choice + MAX_SEED) % (2 * MAX_SEED) - MAX_SEED
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=defaults.top_k if request.top_k is None else request.top_k,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        seed=seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=(
            defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
        ),
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(request, choice, echo_logprobs),
        capacity=request.capacity,
        droppable_spans=request.droppable_spans,
        logit_bias=request.logit_bias,
        allowed_token_ids=request.allowed_token_ids,
        bad_words=constraints.bad_words,
        grammar=constraints.grammar,
        priority=request.priority,
        cache_salt=request.cache_salt or "",
        return_routed_experts=request.return_routed_experts,
    )


def _prompt_logprobs(request: GenerationRequest, choice: int, echo_logprobs: int | None) -> int | None:
    """The prompt is scored once for all of its choices, for whoever wants more of the best tokens."""
    wanted = [k for k in (request.prompt_logprobs, echo_logprobs) if k is not None]
    return max(wanted) if wanted and choice == 0 else None


def truncated(request: GenerationRequest, prompt: list[int], max_model_len: int, max_tokens: int) -> list[int]:
    """The part of a prompt that `truncate_prompt_tokens` keeps.

    Args:
        max_tokens: to be generated, which -1 leaves room for.
    """
    count = request.truncate_prompt_tokens
    if count is None:
        return prompt
    if count == -1:
        count = max(1, max_model_len - max_tokens)
    if count >= len(prompt):
        return prompt
    return prompt[:count] if request.truncation_side == "right" else prompt[len(prompt) - count :]
