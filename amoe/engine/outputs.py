"""What the server is told of the tokens that the head has sampled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from amoe.clock import Clock
from amoe.core.routed_experts import take_routed
from amoe.core.sequence import Sequence, SequenceLife, SequenceTable, UsageColumn
from amoe.core.steps import PromptTokens
from amoe.engine.messages import Outputs
from amoe.engine.sampler import SampledTokens
from amoe.engine.sampling_table import (
    FINISH_COMPLETE,
    FINISH_LENGTH,
    FINISH_STOP,
    FINISH_STUCK,
    GO_ON,
    SamplingTable,
)
from amoe.types import (
    BoolArray,
    CapacityUsage,
    FinishReason,
    Int64Array,
    SequenceOutput,
    SequenceTimes,
    TokenLogprobs,
)

_FINISH: dict[int, FinishReason | None] = {
    GO_ON: None,
    FINISH_STOP: "stop",
    FINISH_LENGTH: "length",
    FINISH_COMPLETE: "stop",
    FINISH_STUCK: "error",
}


def capacity_usage(columns: npt.NDArray[np.float64]) -> CapacityUsage:
    """A row of `SequenceTable.usage`, as it is told to the user."""
    tokens = columns[UsageColumn.TOKENS]
    return CapacityUsage(
        int(columns[UsageColumn.PAIRS]),
        int(columns[UsageColumn.DROPPED]),
        int(columns[UsageColumn.REROUTED]),
        float(columns[UsageColumn.MASS_LOST] / tokens) if tokens else 0.0,
    )


def sequence_times(life: SequenceLife, now: float, *, is_last: bool) -> SequenceTimes | None:
    """What is told with a token that comes now: something with the first and the last one only."""
    is_first = life.first_token_at is None
    if life.first_token_at is None:
        life.first_token_at = now
    if not (is_first or is_last):
        return None
    admitted_at = now if life.admitted_at is None else life.admitted_at
    # A message that comes in a turn is a little younger than the turn, which is when it is admitted.
    queue_s = max(0.0, admitted_at - life.arrived_at)
    return SequenceTimes(queue_s, life.first_token_at - admitted_at, life.num_preemptions)


def prompt_outputs(
    prompt: PromptTokens, sequences: list[Sequence], starts: list[int], scored: SampledTokens
) -> list[SequenceOutput]:
    """What the model thought of prompts: an output for each of the `sequences`, whose tokens begin at `starts`."""
    ends = [*starts[1:], len(prompt.rows)]
    return [
        SequenceOutput(
            sequence.request_id,
            [],
            prompt_logprobs=_logprobs(scored, range(start, end), sequence.params.prompt_logprobs or 0),
        )
        for sequence, start, end in zip(sequences, starts, ends, strict=True)
    ]


def _logprobs(sampled: SampledTokens, indices: range, num_top: int) -> list[TokenLogprobs]:
    """Of some of the tokens, each with the `num_top` best."""
    assert sampled.logprobs is not None and sampled.ranks is not None
    assert sampled.top_ids is not None and sampled.top_logprobs is not None
    where = slice(indices.start, indices.stop)
    best = (sampled.top_ids[where, :num_top], sampled.top_logprobs[where, :num_top])
    columns = (sampled.logprobs[where], *best, sampled.ranks[where])
    return [TokenLogprobs(*entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]


class OutputWriter:
    """Makes the outputs of head steps: columns for most tokens, an object where there is more to say.

    Args:
        complaint: what is wrong with the grammar of a request that is stuck.
        has_capacity: every output tells what capacity has done so far.
    """

    def __init__(
        self,
        table: SequenceTable,
        sampling: SamplingTable,
        clock: Clock,
        complaint: Callable[[int], str],
        *,
        eos_token_ids: tuple[int, ...],
        has_capacity: bool,
    ) -> None:
        self._table = table
        self._sampling = sampling
        self._clock = clock
        self._complaint = complaint
        self._eos_token_ids = eos_token_ids
        self._has_capacity = has_capacity
        # [R] of these sequences there is nothing to say but their next token, until they end.
        self._is_plain: BoolArray = np.zeros(len(table.sequences), np.bool_)

    def enter(self, row: int) -> None:
        """Another sequence has the row, or the same once more."""
        self._is_plain[row] = False

    def write(self, rows: Int64Array, sampled: SampledTokens, codes: npt.NDArray[np.int8]) -> Outputs:
        """Of the tokens `sampled` [n] for the sequences in `rows` [n], which mean `codes` [n] for them."""
        plain = self._is_plain[rows] & (codes == GO_ON)
        special = np.flatnonzero(~plain)
        outputs = self._objects(special, rows, sampled, codes) if len(special) else []
        return Outputs(outputs, self._table.request_id[rows[plain]].tolist(), sampled.token_ids[plain].tolist())

    def _objects(
        self, special: Int64Array, rows: Int64Array, sampled: SampledTokens, codes: npt.NDArray[np.int8]
    ) -> list[SequenceOutput]:
        now = self._clock.now()
        columns = (special, rows[special], sampled.token_ids[special], codes[special])
        outputs = []
        for index, row, token, code in zip(*(column.tolist() for column in columns), strict=True):
            output = self._object(row, token, code, now)
            num_logprobs = int(self._sampling.num_logprobs[row])
            if num_logprobs >= 0 and output.token_ids:
                output.logprobs = _logprobs(sampled, range(index, index + 1), num_logprobs)
            outputs.append(output)
        return outputs

    def _object(self, row: int, token: int, code: int, now: float) -> SequenceOutput:
        sequence = self._table.sequences[row]
        assert sequence is not None, f"row {row} holds no sequence"
        params = sequence.params
        output = SequenceOutput(sequence.request_id, [token], finish_reason=_FINISH[code])
        output.num_cached_tokens = sequence.num_cached_tokens or 0
        output.routed_experts = take_routed(sequence)
        output.times = sequence_times(sequence.life, now, is_last=code != GO_ON)
        if self._has_capacity:
            output.capacity = capacity_usage(self._table.usage[row])
        if params.max_tokens == 0:  # nobody has asked for this token
            output.token_ids, output.finish_reason = [], "length"
        elif code == FINISH_STUCK:
            output.token_ids, output.error = [], self._complaint(sequence.request_id)
        elif code == FINISH_STOP or (code == FINISH_COMPLETE and token in self._eos_token_ids):
            output.stop_token = token
        says_more = self._has_capacity or params.return_routed_experts or params.logprobs is not None
        self._is_plain[row] = not says_more
        return output
