"""Where requests come in at a worker, and tokens go out: all around the head, whatever moves tokens up to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amoe.clock import Clock
from amoe.core.batcher import Batcher
from amoe.core.sequence import Sequence
from amoe.core.steps import HeadStep, PromptTokens
from amoe.engine.executor import HeadBlock
from amoe.engine.messages import AddRequest, ControlPort, Outputs
from amoe.engine.outputs import OutputWriter, prompt_outputs
from amoe.engine.sampling_table import FINISH_LENGTH, FINISH_STUCK, GO_ON, MASKED, SamplingTable, finish_reasons
from amoe.engine.structured import Grammars
from amoe.types import BoolArray, Int64Array, SequenceOutput

_SEED_STRIDE = 0x9E3779B9  # so that neighbouring base seeds do not share the seeds of neighbouring requests


class HomeCore(Protocol):
    """What a home needs of its core, however that moves the tokens."""

    @property
    def batcher(self) -> Batcher: ...

    def on_head(self, step: HeadStep, token_ids: npt.NDArray[np.int64], finished: BoolArray) -> None: ...


class Home:
    """Requests and head steps of one attention worker.

    Args:
        core: moves the tokens.
        head: logits and samples.
        has_capacity: sequences may lose pairs, and are told.
        seed: base of the seeds of requests that bring none.
    """

    def __init__(
        self,
        core: HomeCore,
        head: HeadBlock,
        sampling: SamplingTable,
        control: ControlPort,
        grammars: Grammars,
        *,
        eos_token_ids: tuple[int, ...],
        seed: int,
        clock: Clock,
        has_capacity: bool = False,
    ) -> None:
        self.batcher = core.batcher
        self._core = core
        self._head = head
        self._sampling = sampling
        self._control = control
        self._grammars = grammars
        self._clock = clock
        # Requests that wait for their grammar, and when they came.
        self._compiling: dict[int, tuple[AddRequest, float]] = {}
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._outputs = OutputWriter(
            self.batcher.table,
            sampling,
            clock,
            grammars.complaint,
            eos_token_ids=eos_token_ids,
            has_capacity=has_capacity,
        )

    # ---- requests

    def add(self, message: AddRequest) -> None:
        """A request waits. One that the server should have refused still ends."""
        batcher, count = self.batcher, len(message.prompt_token_ids) - message.num_generated
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
        sequence = self.batcher.add(
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
        return was_compiling or self.batcher.abort(request_id) is not None

    # ---- tokens

    def run_head(self, step: HeadStep) -> None:
        """Run the head, sample, and tell the server."""
        if step.prompt is not None:
            self._control.send(Outputs(self._score(step.prompt)))
        if len(step.slots) == 0:
            self._core.on_head(step, np.empty(0, np.int64), np.empty(0, np.bool_))
            return
        self._set_sampling_rows()
        table, rows = self.batcher.table, step.rows.astype(np.int64)
        num_generated = table.num_tokens[rows] - table.prompt_len[rows]
        requests = self._requests_with_grammars(rows)
        sampled = self._head.sample(step, self._sampling, num_generated, lambda: self._grammars.masks(requests))
        codes = finish_reasons(self._sampling, rows, sampled.token_ids, num_generated + 1)
        if sampled.stuck is not None:
            codes[sampled.stuck] = FINISH_STUCK
        if requests:
            self._advance_grammars(rows, requests, sampled.token_ids, codes)
        outputs = self._outputs.write(rows, sampled, codes)
        for row in rows[codes != GO_ON].tolist():
            if row in requests:
                self._grammars.discard(requests[row])
        self._core.on_head(step, sampled.token_ids, codes != GO_ON)
        self._control.send(outputs)

    def _requests_with_grammars(self, rows: Int64Array) -> dict[int, int]:
        """Request ids by row."""
        table, needs = self.batcher.table, self._sampling.needs
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
        table, rows = self.batcher.table, prompt.rows
        token_ids = table.tokens[rows, prompt.positions + 1].astype(np.int64)
        starts = np.flatnonzero(np.diff(rows, prepend=-1)).tolist()
        sequences = [self._sequence_at(int(rows[start])) for start in starts]
        num_top = max(sequence.params.prompt_logprobs or 0 for sequence in sequences)
        scored = self._head.score(prompt, token_ids, num_top)
        return prompt_outputs(prompt, sequences, starts, scored)

    def _sequence_at(self, row: int) -> Sequence:
        sequence = self.batcher.table.sequences[row]
        assert sequence is not None, f"row {row} holds no sequence"
        return sequence

    def _set_sampling_rows(self) -> None:
        for sequence in self.batcher.take_admitted():
            if sequence.row >= 0:
                default_seed = self._seed * _SEED_STRIDE + sequence.request_id
                self._sampling.set(sequence.row, sequence.params, default_seed, self._eos_token_ids)
                self._outputs.enter(sequence.row)
