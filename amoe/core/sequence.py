"""Sequences, and the tables that hold what array operations need to know of the running ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from amoe.types import BoolArray, Int16Array, Int32Array, Int64Array, SamplingParams


class UsageColumn(IntEnum):
    """Columns of `SequenceTable.usage`."""

    PAIRS = 0  # that the routers wanted
    DROPPED = 1
    REROUTED = 2
    MASS_LOST = 3  # sum over tokens and layers of the lost part of each
    TOKENS = 4  # once per layer


NUM_USAGE_COLUMNS = len(UsageColumn)


class SequenceStatus(IntEnum):
    """Where a sequence is in its life."""

    WAITING = 0  # has no row, no slots, no KV: new, or preempted
    PREFILL = 1  # its prompt is being computed, chunk by chunk
    DECODE = 2  # one token in flight or about to be
    FINISHED = 3


@dataclass(slots=True)
class SequenceLife:
    """When things happened to a sequence, by its worker's clock, in seconds; None: they have not happened yet.

    Attributes:
        arrived_at, admitted_at, first_token_at: `admitted_at` is the first time that it got a row and KV blocks.
        num_preemptions: times that it had to give them back.
    """

    arrived_at: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's sequence at its home worker.

    Attributes:
        token_ids: [n] int32 prompt (after a preemption: prompt and generated tokens); only while WAITING.
        prompt_len: tokens of the user's prompt; preemption does not change it.
        order: see `amoe.policy.admission.place_in_line`: the least is admitted first, the greatest preempted first.
        row: row in the tables; -1 while WAITING.
        slots: slots of the tokens in flight; after a prefill the one slot that it keeps.
        blocks: blocks of the KV cache, in order.
        hashes: names of the leading blocks that are committed to the prefix cache.
        num_cached_tokens: prompt tokens that the prefix cache spared at the first admission; None before it.
        num_scored: leading prompt tokens whose successors' log-probabilities have been told, if they are wanted.
        num_routed: leading tokens of which the experts are known, if they are wanted; routed: [m, L, K] int16 arrays
            with those of them that have not been told, see `amoe.core.routed_experts`.
        group: names the sequences that share this prompt among themselves: the first one's request; None: nobody does.
        life: what its time has gone into.
        usage: see `UsageColumn`; only while WAITING.
    """

    request_id: int
    params: SamplingParams
    token_ids: Int32Array
    prompt_len: int
    order: tuple[int, int]
    status: SequenceStatus = SequenceStatus.WAITING
    row: int = -1
    slots: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int | None = None
    num_scored: int = 0
    num_routed: int = 0
    routed: list[Int16Array] = field(default_factory=list)
    group: int | None = None
    life: SequenceLife = field(default_factory=SequenceLife)
    usage: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_USAGE_COLUMNS))

    @property
    def unscored(self) -> range:
        """Positions of the prompt tokens whose successors' log-probabilities are wanted, and have not been told."""
        return range(self.num_scored, 0 if self.params.prompt_logprobs is None else self.prompt_len - 1)

    @property
    def num_sparable(self) -> int:
        """Leading tokens that need not go through the model where their KV is found: nobody asks what they say there.

        Only while WAITING.
        """
        if self.unscored:
            return 0
        return self.num_routed if self.params.return_routed_experts else len(self.token_ids)


class SequenceTable:
    """Struct of arrays over the rows of running sequences.

    Attributes:
        tokens: [R, max_model_len] prompt, then generated tokens.
        num_tokens, num_computed, prompt_len: [R]; `num_computed` tokens have their KV in every layer.
        block_table: [R, max_blocks] blocks of the KV cache.
        slot: [R] slot of the decode token.
        request_id, is_exact: [R] of the sequence.
        tells_experts: [R] it is wanted which experts its tokens take; num_telling: rows of which it is.
        usage: [R, NUM_USAGE_COLUMNS] what capacity has done to it.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self.tokens: Int32Array = np.zeros((num_rows, max_model_len), np.int32)
        self.num_tokens: Int64Array = np.zeros(num_rows, np.int64)
        self.num_computed: Int64Array = np.zeros(num_rows, np.int64)
        self.prompt_len: Int64Array = np.zeros(num_rows, np.int64)
        self.block_table: Int32Array = np.zeros((num_rows, -(-max_model_len // block_size)), np.int32)
        self.slot: Int32Array = np.full(num_rows, -1, np.int32)
        self.request_id: Int64Array = np.zeros(num_rows, np.int64)
        self.is_exact: BoolArray = np.zeros(num_rows, np.bool_)
        self.tells_experts: BoolArray = np.zeros(num_rows, np.bool_)
        self.num_telling = 0
        self.usage: npt.NDArray[np.float64] = np.zeros((num_rows, NUM_USAGE_COLUMNS))
        self.sequences: list[Sequence | None] = [None] * num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def has_lost(self, row: int) -> bool:
        """Some of its pairs have been dropped, or computed by other experts."""
        return bool(self.usage[row, UsageColumn.DROPPED] or self.usage[row, UsageColumn.REROUTED])

    def enter(self, sequence: Sequence) -> None:
        """Give a waiting sequence, whose blocks are set, a row."""
        row = self._free_rows.pop()
        count = len(sequence.token_ids)
        sequence.row = row
        self.sequences[row] = sequence
        self.tokens[row, :count] = sequence.token_ids
        self.num_tokens[row] = count
        self.prompt_len[row] = sequence.prompt_len
        self.num_computed[row] = 0
        self.request_id[row] = sequence.request_id
        self.is_exact[row] = sequence.params.capacity == "exact"
        self.tells_experts[row] = sequence.params.return_routed_experts
        self.num_telling += sequence.params.return_routed_experts
        self.usage[row] = sequence.usage
        self.block_table[row, : len(sequence.blocks)] = sequence.blocks
        sequence.token_ids = np.empty(0, np.int32)

    def leave(self, sequence: Sequence) -> Int32Array:
        """Take the row back. Returns the sequence's tokens [n]."""
        row = sequence.row
        token_ids = self.tokens[row, : self.num_tokens[row]].copy()
        self.sequences[row] = None
        sequence.usage = self.usage[row].copy()
        self._free_rows.append(row)
        self.num_telling -= sequence.params.return_routed_experts
        self.tells_experts[row] = False
        self.slot[row] = -1
        sequence.row = -1
        return token_ids
