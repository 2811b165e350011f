"""The attention side of a worker's shell: requests in, tokens out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from amoe.clock import Clock
from amoe.core.attention import AttentionCore
from amoe.core.routed_experts import take_routed
from amoe.core.sequence import Sequence, SequenceLife, UsageColumn
from amoe.core.steps import AttentionStep, HeadStep, Outgoing, PromptTokens
from amoe.engine.executor import AttentionBlocks
from amoe.engine.messages import AddRequest, ControlPort, Outputs, Steer
from amoe.engine.sampler import SampledTokens
from amoe.engine.sampling_table import (
    FINISH_COMPLETE,
    FINISH_LENGTH,
    FINISH_STOP,
    FINISH_STUCK,
    GO_ON,
    MASKED,
    SamplingTable,
    finish_reasons,
)
from amoe.engine.structured import Grammars
from amoe.types import (
    Batch,
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
_SEED_STRIDE = 0x9E3779B9  # so that neighbouring base seeds do not share the seeds of neighbouring requests


def capacity_usage(columns: npt.NDArray[np.float64]) -> CapacityUsage:
    """A row of `SequenceTable.usage`, as it is told to the user."""
    tokens = columns[UsageColumn.TOKENS]
    return CapacityUsage(
        int(columns[UsageColumn.PAIRS]),
        int(columns[UsageColumn.DROPPED]),
        int(columns[UsageColumn.REROUTED]),
        float(columns[UsageColumn.MASS_LOST] / tokens) if tokens else 0.0,
    )


def _logprobs(sampled: SampledTokens, indices: range, num_top: int) -> list[TokenLogprobs]:
    """Of some of the tokens, each with the `num_top` best."""
    assert sampled.logprobs is not None and sampled.ranks is not None
    assert sampled.top_ids is not None and sampled.top_logprobs is not None
    where = slice(indices.start, indices.stop)
    best = (sampled.top_ids[where, :num_top], sampled.top_logprobs[where, :num_top])
    columns = (sampled.logprobs[where], *best, sampled.ranks[where])
    return [TokenLogprobs(*entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]


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


class Home:
    """Requests, attention steps and head steps of one attention worker.

    Args:
        owner_of_rank: index of an expert worker among the expert workers.
        seed: base of the seeds of requests that bring none.
    """

    def __init__(
        self,
        core: AttentionCore,
        executor: AttentionBlocks,
        sampling: SamplingTable,
        control: ControlPort,
        grammars: Grammars,
        *,
        owner_of_rank: dict[int, int],
        eos_token_ids: tuple[int, ...],
        seed: int,
        clock: Clock,
    ) -> None:
        self.core = core
        self._executor = executor
        self._sampling = sampling
        self._control = control
        self._grammars = grammars
        self._clock = clock
        # Requests that wait for their grammar, and when they came.
        self._compiling: dict[int, tuple[AddRequest, float]] = {}
        self._owner_of_rank = owner_of_rank
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._topology_version = 0

    # ---- requests

    def add(self, message: AddRequest) -> None:
        """A request waits. One that the server should have refused still ends."""
        batcher, count = self.core.batcher, len(message.prompt_token_ids) - message.num_generated
        if count <= 0 or count + max(1, message.params.max_tokens) > batcher.max_model_len:
            self._control.send(Outputs([SequenceOutput(message.request_id, [], finish_reason="error")]))
            return
        if message.params.grammar is not None:
            self._compiling[message.request_id] = (message, self._clock.now())
            generated = message.prompt_token_ids[count:]
            self._grammars.add(message.request_id, message.params.grammar, generated)
            return
        self._enter(message, self._clock.now())

    def _enter(self, message: AddRequest, arrived_at: float) -> None:
        token_ids = np.asarray(message.prompt_token_ids, np.int32)
        sequence = self.core.batcher.add(
            message.request_id,
            token_ids,
            message.params,
            message.sibling_of,
            num_generated=message.num_generated,
            num_routed=message.num_routed,
        )
        sequence.life.arrived_at = arrived_at

    @property
    def is_compiling(self) -> bool:
        """Requests wait for their grammars: `poll` will bring them in, and nobody wakes the worker for it."""
        return self._grammars.is_compiling

    def warm_up(self) -> None:
        """Do beside the loop what the first request with a grammar would otherwise wait for."""
        self._grammars.warm_up()

    def poll(self) -> None:
        """Requests whose grammars have been compiled may run; those with a wrong one end."""
        if not self._compiling:
            return
        for request_id, complaint in self._grammars.take_ready():
            message, arrived_at = self._compiling.pop(request_id)
            if complaint:
                output = SequenceOutput(request_id, [], finish_reason="error", error=complaint)
                self._control.send(Outputs([output]))
            else:
                self._enter(message, arrived_at)

    def close(self) -> None:
        """The worker leaves."""
        self._grammars.close()

    def abort(self, request_ids: Iterable[int]) -> None:
        """Free sequences at any stage. One that has just ended is none of our business any more."""
        aborted = [
            SequenceOutput(request_id, [], finish_reason="abort")
            for request_id in request_ids
            if self._drop(request_id)
        ]
        if aborted:
            self._control.send(Outputs(aborted))

    def _drop(self, request_id: int) -> bool:
        """Free a sequence. False: it is not here."""
        self._grammars.discard(request_id)
        was_compiling = self._compiling.pop(request_id, None) is not None
        return was_compiling or self.core.batcher.abort(request_id) is not None

    def steer(self, message: Steer) -> None:
        """Tokens choose among the replicas of their experts by other shares. Nothing happens if the shares belong to
        another table than the one in force: the server will plan anew."""
        if message.version != self._topology_version:
            return
        shares = np.frombuffer(message.shares, "<f4")
        self.core.set_shares(shares.reshape(self.core.replica_shape))

    def on_topology(self, version: int) -> None:
        """Another topology is in force at the core."""
        self._topology_version = version

    @property
    def moe_inputs(self) -> torch.Tensor:
        """[S, H] by slot, of the tokens that may have to be sent again."""
        return self._executor.moe_inputs

    # ---- tokens

    def keep(self, batch: Batch, kept: BoolArray) -> None:
        """A RESULT has come; rows `kept` [n] are awaited."""
        self._executor.keep(batch, self._owner_of_rank[batch.src], kept)

    def run_attention(self, step: AttentionStep, now: float) -> tuple[list[Outgoing], torch.Tensor | None]:
        """Run attention(layer). Returns what to dispatch, and the tensor [n, H] whose rows it names."""
        if step.num_tokens == 0:  # a wave marches on although its tokens are gone
            nothing = np.empty((0, 1))
            return self.core.on_attention(step, nothing.astype(np.int64), nothing.astype(np.float32), now), None
        routed = self._executor.attention(step)
        if routed is None:
            return self.core.on_attention(step, None, None, now), None
        outgoing = self.core.on_attention(step, routed.topk_ids, routed.topk_weights, now, routed.scores)
        return outgoing, routed.moe_input

    def run_head(self, step: HeadStep) -> None:
        """Run the head, sample, and tell the server."""
        if step.prompt is not None:
            self._control.send(Outputs(self._score(step.prompt)))
        if len(step.slots) == 0:
            self.core.on_head(step, np.empty(0, np.int64), np.empty(0, np.bool_))
            return
        self._set_sampling_rows()
        table, rows = self.core.batcher.table, step.rows.astype(np.int64)
        num_generated = table.num_tokens[rows] - table.prompt_len[rows]
        requests = self._requests_with_grammars(rows)
        sampled = self._executor.sample(step, self._sampling, num_generated, lambda: self._grammars.masks(requests))
        codes = finish_reasons(self._sampling, rows, sampled.token_ids, num_generated + 1)
        if sampled.stuck is not None:
            codes[sampled.stuck] = FINISH_STUCK
        if requests:
            self._advance_grammars(rows, requests, sampled.token_ids, codes)
        outputs = self._outputs(rows, sampled, codes)
        for row in rows[codes != GO_ON].tolist():
            if row in requests:
                self._grammars.discard(requests[row])
        self.core.on_head(step, sampled.token_ids, codes != GO_ON)
        self._control.send(Outputs(outputs))

    def _requests_with_grammars(self, rows: Int64Array) -> dict[int, int]:
        """Request ids by row."""
        table, needs = self.core.batcher.table, self._sampling.needs
        asking = rows[(needs[rows] & MASKED) != 0]
        requests = {int(row): int(table.request_id[row]) for row in asking}
        return {row: request_id for row, request_id in requests.items() if request_id in self._grammars}

    def _advance_grammars(
        self, rows: Int64Array, requests: dict[int, int], token_ids: Int64Array, codes: npt.NDArray[np.int8]
    ) -> None:
        """Tell the grammars of `requests` their new tokens. Sets the `codes` [n] of those whose text is whole."""
        for index, (row, token_id) in enumerate(zip(rows.tolist(), token_ids.tolist(), strict=True)):
            if row in requests and codes[index] in (GO_ON, FINISH_LENGTH):
                verdict = self._grammars.advance(requests[row], token_id)
                codes[index] = codes[index] if verdict == GO_ON else verdict
        going_on = rows[codes == GO_ON].tolist()
        self._grammars.prepare([requests[row] for row in going_on if row in requests])

    def _score(self, prompt: PromptTokens) -> list[SequenceOutput]:
        """What the model thought of prompts: an output for each of their chunks."""
        table, rows = self.core.batcher.table, prompt.rows
        token_ids = table.tokens[rows, prompt.positions + 1].astype(np.int64)
        starts = np.flatnonzero(np.diff(rows, prepend=-1)).tolist()
        sequences = [self._sequence_at(int(rows[start])) for start in starts]
        num_top = [sequence.params.prompt_logprobs or 0 for sequence in sequences]
        scored = self._executor.score(prompt, token_ids, max(num_top))
        return [
            SequenceOutput(sequence.request_id, [], prompt_logprobs=_logprobs(scored, range(start, end), count))
            for sequence, count, start, end in zip(sequences, num_top, starts, [*starts[1:], len(rows)], strict=True)
        ]

    def _sequence_at(self, row: int) -> Sequence:
        sequence = self.core.batcher.table.sequences[row]
        assert sequence is not None, f"row {row} holds no sequence"
        return sequence

    def _set_sampling_rows(self) -> None:
        for sequence in self.core.batcher.take_admitted():
            if sequence.row >= 0:
                default_seed = self._seed * _SEED_STRIDE + sequence.request_id
                self._sampling.set(sequence.row, sequence.params, default_seed, self._eos_token_ids)

    def _outputs(self, rows: Int64Array, sampled: SampledTokens, codes: npt.NDArray[np.int8]) -> list[SequenceOutput]:
        outputs, now = [], self._clock.now()
        for row, token, code in zip(rows.tolist(), sampled.token_ids.tolist(), codes.tolist(), strict=True):
            sequence = self._sequence_at(row)
            output = SequenceOutput(sequence.request_id, [token], finish_reason=_FINISH[code])
            output.num_cached_tokens = sequence.num_cached_tokens or 0
            output.routed_experts = take_routed(sequence)
            output.times = sequence_times(sequence.life, now, is_last=code != GO_ON)
            if self.core.capacity is not None:
                output.capacity = capacity_usage(self.core.batcher.table.usage[row])
            if sequence.params.max_tokens == 0:  # nobody has asked for this token
                output.token_ids, output.finish_reason = [], "length"
            elif code == FINISH_STUCK:
                output.token_ids, output.error = [], self._grammars.complaint(sequence.request_id)
            elif code == FINISH_STOP or (code == FINISH_COMPLETE and token in self._eos_token_ids):
                output.stop_token = token
            outputs.append(output)
        if sampled.logprobs is not None:
            self._attach_logprobs(outputs, rows, sampled)
        return outputs

    def _attach_logprobs(self, outputs: list[SequenceOutput], rows: Int64Array, sampled: SampledTokens) -> None:
        wanted = self._sampling.num_logprobs[rows]
        for index in np.flatnonzero(wanted >= 0).tolist():
            if outputs[index].token_ids:
                outputs[index].logprobs = _logprobs(sampled, range(index, index + 1), int(wanted[index]))
