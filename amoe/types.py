"""Words that every layer of amoe shares: blocks, token batches, sampling parameters, tokens that come out.

Arrays are numpy, so that `core` and `policy` need no torch; only a batch's payload is a tensor.
Shape letters: n tokens, K experts per token (top-k), H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from amoe.errors import RequestError

if TYPE_CHECKING:
    import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Int16Array = npt.NDArray[np.int16]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

FinishReason = Literal["stop", "length", "abort", "error"]
CapacityChoice = Literal["best_effort", "exact"]


class BlockKind(IntEnum):
    """The three kinds of block: the unit of execution and of placement."""

    ATTENTION = 0
    EXPERTS = 1
    HEAD = 2


class BlockId(NamedTuple):
    """One block, and the wave (in lockstep: ping-pong micro-batch) whose tokens wait for it; 0 in other schedules."""

    kind: BlockKind
    layer: int
    wave: int = 0


class BatchKind(IntEnum):
    """What a batch on the wire is."""

    DISPATCH = 1  # tokens on their way to experts
    RESULT = 2  # one pre-summed row per token on its way home
    ANNOUNCE = 3  # waves and lockstep: "this home starts epoch e of wave w with n tokens"


_SHOWN = 200  # characters of a wrong value in a message

# Shared by all batches that have no such column: markers are many, and nothing can be written into an empty array.
_NO_INT32: Int32Array = np.empty(0, np.int32)
_NO_IDS: Int16Array = np.empty((0, 0), np.int16)
_NO_WEIGHTS: Float32Array = np.empty((0, 0), np.float32)


@dataclass(slots=True)
class Batch:
    """Tokens that travel together between two workers: a struct of arrays.

    Attributes:
        kind: what it is; ANNOUNCE has no columns, and DISPATCH may have n = 0 (a marker: "no token of mine for you").
        src, dst: ranks of workers.
        layer, wave, epoch: where the tokens stand; `epoch` counts the iterations of a wave.
        count: n, except for ANNOUNCE, where it is the number of tokens that the home brings.
        slots: [n] token slots at the home worker.
        generations: [n] of those slots: a late answer to a freed slot is recognised by them.
        iterations: [n] (DISPATCH) iteration of each token, the major part of its progress key.
        expert_ids: [n, K] (DISPATCH) global expert ids at this destination, -1 where there is none.
        expert_weights: [n, K] (DISPATCH) weights of those pairs.
        payload: [n, H] hidden states in the model's dtype; None if n = 0.
        latest_iteration: (RESULT) the greatest that the expert worker has seen, whichever home it came from;
            (ANNOUNCE) the iteration, or pass number, of the tokens of this epoch.
        num_waves: (ANNOUNCE of `waves`) the number of waves by the leader's decision.
        backlog_s, row_s: (RESULT) seconds of work that wait at the expert worker, and that a row more adds there;
            a `row_s` below 0 tells nothing.
        src_incarnation, dst_incarnation: which life of the sender sent it, to which life of the receiver, modulo 256:
            what a worker that has died has sent, and what was meant for it, is none of its successor's business.
    """

    kind: BatchKind
    src: int
    dst: int
    layer: int
    wave: int = 0
    epoch: int = 0
    count: int = 0
    slots: Int32Array = field(default_factory=lambda: _NO_INT32)
    generations: Int32Array = field(default_factory=lambda: _NO_INT32)
    iterations: Int32Array = field(default_factory=lambda: _NO_INT32)
    expert_ids: Int16Array = field(default_factory=lambda: _NO_IDS)
    expert_weights: Float32Array = field(default_factory=lambda: _NO_WEIGHTS)
    payload: torch.Tensor | None = None
    latest_iteration: int = 0
    num_waves: int = 0
    backlog_s: float = 0.0
    row_s: float = -1.0
    src_incarnation: int = 0
    dst_incarnation: int = 0


def _are_ids(ids: Sequence[int]) -> bool:
    """Different numbers that may be token ids."""
    return not ids or (min(ids) >= 0 and max(ids) < 2**31 and len(set(ids)) == len(ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one sequence, validated at construction.

    Attributes:
        max_tokens: tokens to generate at most (>= 1; or 0 with `prompt_logprobs`: those alone are wanted).
        min_tokens: no end of sequence and no stop id before this many tokens.
        temperature: 0 is greedy.
        top_p, min_p: in (0, 1] and [0, 1].
        top_k: 0 or -1 is off (stored as 0).
        seed: the same seed, prompt and parameters give the same tokens, whatever else is in the batch.
        presence_penalty, frequency_penalty: in [-2, 2], over the generated tokens.
        repetition_penalty: > 0, over prompt and generated tokens.
        stop: strings that end the text; not part of it unless `include_stop_str_in_output`.
        stop_token_ids: ids that end the sequence.
        skip_special_tokens: special tokens are no text, but for those of `visible_token_ids`.
        ignore_eos: go on after the end-of-sequence token.
        logprobs: None is off; k >= 0 gives the sampled token's and the k best.
        prompt_logprobs: the same for the tokens of the prompt, each given those before it.
        capacity: `exact`: no pair of this sequence is dropped or rerouted, whatever the server may do to others.
        droppable_spans: (start, end) positions of the prompt whose tokens lose pairs before all others do.
        logit_bias: (token id, bias in [-100, 100]) pairs, added to the logits.
        allowed_token_ids: nothing else is sampled; empty: anything is.
        bad_words: token sequences of which none is completed by generated tokens.
        grammar: what the text must be, as llguidance serialises it; None: anything. A text that cannot go on ends the
            sequence, whatever `min_tokens` and `ignore_eos` say.
        priority: who waits with the least number is admitted first, where the server schedules by priority.
        cache_salt: the prefix cache is shared with requests of the same salt only.
        return_routed_experts: tell which experts each token took.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    visible_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    capacity: CapacityChoice = "best_effort"
    droppable_spans: tuple[tuple[int, int], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    priority: int = 0
    cache_salt: str = ""
    return_routed_experts: bool = False

    MAX_LOGPROBS: ClassVar[int] = 20
    MAX_STOP_IDS: ClassVar[int] = 64
    MAX_SPANS: ClassVar[int] = 64
    MAX_BIASES: ClassVar[int] = 1024
    MAX_BAD_WORDS: ClassVar[int] = 128
    MAX_SALT_CHARS: ClassVar[int] = 256

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        checks = (
            (
                "max_tokens",
                self.max_tokens >= 1 or (self.max_tokens == 0 and self.prompt_logprobs is not None),
                "must be at least 1 (0 goes with log-probabilities of the prompt only: echo and logprobs)",
            ),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "must be between 0 and max_tokens"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "must be a finite number of at least 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be in (0, 1]"),
            ("top_k", 0 <= self.top_k < 2**31, "must be -1 or 0 (off) or at least 1, and below 2**31"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be in [0, 1]"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "must be in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "must be in [-2, 2]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "must be greater than 0"),
            ("stop", all(self.stop), "must not hold an empty string"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= self.MAX_STOP_IDS and all(0 <= i < 2**31 for i in self.stop_token_ids),
                f"must hold at most {self.MAX_STOP_IDS} ids, each at least 0",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= self.MAX_LOGPROBS,
                f"must be between 0 and {self.MAX_LOGPROBS}",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= self.MAX_LOGPROBS,
                f"must be between 0 and {self.MAX_LOGPROBS}",
            ),
            ("capacity", self.capacity in ("best_effort", "exact"), "must be 'best_effort' or 'exact'"),
            (
                "droppable_spans",
                len(self.droppable_spans) <= self.MAX_SPANS and all(0 <= a < b for a, b in self.droppable_spans),
                f"must hold at most {self.MAX_SPANS} pairs [start, end) of token positions, 0 <= start < end",
            ),
            (
                "logit_bias",
                len(self.logit_bias) <= self.MAX_BIASES
                and _are_ids([token_id for token_id, _ in self.logit_bias])
                and all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias),
                f"must give at most {self.MAX_BIASES} different token ids a bias in [-100, 100] each",
            ),
            ("allowed_token_ids", _are_ids(self.allowed_token_ids), "must hold different ids, each at least 0"),
            (
                "bad_words",
                len(self.bad_words) <= self.MAX_BAD_WORDS
                and all(word and min(word) >= 0 and max(word) < 2**31 for word in self.bad_words),
                f"must hold at most {self.MAX_BAD_WORDS} words of at least one token each",
            ),
            ("priority", -(2**31) <= self.priority < 2**31, "must be a 32-bit integer"),
            (
                "cache_salt",
                len(self.cache_salt) <= self.MAX_SALT_CHARS,
                f"has at most {self.MAX_SALT_CHARS} characters",
            ),
        )
        for name, holds, rule in checks:
            if not holds:
                given = repr(getattr(self, name))
                shown = given if len(given) <= _SHOWN else given[:_SHOWN] + "..."
                raise RequestError(f"{name} {rule}, not {shown}", param=name)


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's distribution before temperature and truncation.

    Attributes:
        logprob: of the token that is there: sampled, or of the prompt.
        top_ids, top_logprobs: of the k best tokens, best first.
        rank: of the token that is there: 1 is the best one. 0: nobody has asked.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int = 0


@dataclass(slots=True)
class CapacityUsage:
    """What capacity has done to one sequence so far, over all its tokens and layers.

    Attributes:
        pairs: (token, expert) pairs that the router wanted.
        pairs_dropped, pairs_rerouted: of those, computed nowhere, and by another expert than the router's.
        gate_mass_lost: part of the routers' weight, in [0, 1], that is missing in what was computed.
    """

    pairs: int = 0
    pairs_dropped: int = 0
    pairs_rerouted: int = 0
    gate_mass_lost: float = 0.0

    def plus(self, other: CapacityUsage | None) -> CapacityUsage:
        """Of both together: every token wants the same number of pairs, which tells what each side's part weighs."""
        if other is None:
            return self
        pairs = self.pairs + other.pairs
        lost = self.gate_mass_lost * self.pairs + other.gate_mass_lost * other.pairs
        return CapacityUsage(
            pairs,
            self.pairs_dropped + other.pairs_dropped,
            self.pairs_rerouted + other.pairs_rerouted,
            lost / pairs if pairs else 0.0,
        )


@dataclass(slots=True)
class SequenceTimes:
    """What a sequence's time at its worker went into, by the worker's clock.

    Attributes:
        queue_s: seconds before it was first admitted; prefill_s: from there to its first token.
        num_preemptions: times that it lost its KV cache to others so far.
    """

    queue_s: float
    prefill_s: float
    num_preemptions: int = 0


@dataclass(slots=True)
class SequenceOutput:
    """What a worker has to say about one sequence after one head step.

    Attributes:
        request_id: the engine's number of the request.
        token_ids: new tokens; empty with a `finish_reason` that brings none, or with `prompt_logprobs` alone.
        logprobs: one per new token if asked for, else empty.
        finish_reason: set exactly once, in the sequence's one terminal event.
        stop_token: the stop id that ended it, where one did.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        capacity: None where capacity is off.
        prompt_logprobs: the next ones, if asked for: one per prompt token but the first, in order, over several outputs
            that come before the first new token.
        routed_experts: if asked for: little-endian int16 [m, L, K] in C order, the experts that the next m tokens took
            in the L MoE layers; over all outputs of a sequence every token that went through the model, once, in order.
        error: with the finish reason `error`: what is wrong with the request, for its user; empty: it is not to blame.
        times: comes with the first token and, once more, with the last.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0
    capacity: CapacityUsage | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    routed_experts: bytes = b""
    error: str = ""
    times: SequenceTimes | None = None
