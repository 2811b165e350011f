"""One sequence as the server sees it: outputs of a worker in, deltas of text out. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from amoe.engine.detokenizer import Detokenizer
from amoe.types import CapacityUsage, FinishReason, SamplingParams, SequenceOutput, TokenLogprobs


@dataclass(slots=True)
class GenerationDelta:
    """What is new since the last delta.

    Attributes:
        text: new text, which may lag behind the tokens (half a character, the start of a stop string).
        token_ids: new tokens, the one that ended the sequence included.
        logprobs: one per new token, if asked for.
        prompt_logprobs: one per token of the prompt but the first, if asked for, all of them in the first delta.
        finish_reason: set in the last delta only.
        stop_reason: the stop string or stop token id of the request that ended it; None for end of sequence.
        num_prompt_tokens, num_cached_tokens: of the whole request.
        num_generated_tokens: up to and including this delta.
        capacity: what capacity has done to the sequence so far; None where it is off.
        routed_experts: if asked for: int16 [m, L, P] of the next m tokens, see `SequenceOutput`.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    capacity: CapacityUsage | None = None
    routed_experts: bytes | bytearray = b""

    def merge(self, later: GenerationDelta) -> None:
        """Append `later`: a consumer that is slower than the engine gets larger deltas, not more of them."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_cached_tokens = later.num_cached_tokens
        self.num_generated_tokens = later.num_generated_tokens
        self.capacity = later.capacity
        if later.routed_experts:
            self._add_routed(later.routed_experts)

    def _add_routed(self, routed_experts: bytes | bytearray) -> None:
        if not isinstance(self.routed_experts, bytearray):  # grows in place: a long sequence has thousands of parts
            self.routed_experts = bytearray(self.routed_experts)
        self.routed_experts += routed_experts


class GenerationState:
    """Turns the outputs of one sequence into deltas, and sees stop strings.

    Attributes:
        prompt_token_ids, generated_token_ids: what it consists of, as far as it has been told.
        num_cached_tokens: of the prompt, when it was first computed.
        num_routed_bytes: of what has been told of its tokens' experts.
    """

    def __init__(self, params: SamplingParams, detokenizer: Detokenizer, prompt_token_ids: Sequence[int]) -> None:
        self.params = params
        self._detokenizer = detokenizer
        self.prompt_token_ids = prompt_token_ids
        self.generated_token_ids: list[int] = []
        self.num_cached_tokens = 0
        self.num_routed_bytes = 0
        self._capacity: CapacityUsage | None = None
        self._capacity_before: CapacityUsage | None = None  # what workers that have died have told
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._routed_experts = b""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.generated_token_ids)

    def move(self) -> None:
        """The worker has died, and another one goes on. It begins again with what has not been told in full."""
        self._capacity_before = self._capacity
        self._prompt_logprobs, self._routed_experts = [], b""

    def advance(self, output: SequenceOutput) -> GenerationDelta | None:
        """The delta that `output` brings. A stop string in it ends the sequence, whatever the worker says.

        Returns:
            None: it brings a part of what is told of the prompt, which comes with the first token.
        """
        self._prompt_logprobs += output.prompt_logprobs
        self._routed_experts += output.routed_experts
        if not output.token_ids and output.finish_reason is None:
            return None
        if not self.generated_token_ids:  # another worker finds more or less in its cache: that is no saving
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.capacity is not None:
            self._capacity = output.capacity.plus(self._capacity_before)
        pieces: list[str] = []
        count = 0
        for token_id in output.token_ids:
            count += 1
            # The token that ends the sequence is counted, but is no text. It comes last, so that none is skipped.
            if token_id == output.stop_token and not self.params.include_stop_str_in_output:
                break
            pieces.append(self._detokenizer.push(token_id))
            if self._detokenizer.stop_string is not None:
                break
        if output.finish_reason is not None:
            pieces.append(self._detokenizer.flush())
        self.generated_token_ids += output.token_ids[:count]
        return self._delta("".join(pieces), output, count)

    def _delta(self, text: str, output: SequenceOutput, count: int) -> GenerationDelta:
        finish_reason = output.finish_reason
        stop_reason: str | int | None = None
        if self._detokenizer.stop_string is not None:
            finish_reason, stop_reason = "stop", self._detokenizer.stop_string
        elif output.stop_token in self.params.stop_token_ids:
            stop_reason = output.stop_token
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        routed_experts, self._routed_experts = self._routed_experts, b""
        self.num_routed_bytes += len(routed_experts)
        return GenerationDelta(
            text=text,
            token_ids=output.token_ids[:count],
            logprobs=output.logprobs[:count],
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_generated_tokens=self.num_generated_tokens,
            capacity=self._capacity,
            routed_experts=routed_experts,
        )
