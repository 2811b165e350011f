"""Continuous batching at one attention worker: which sequences have tokens in flight, and on which KV blocks.

A sequence is WAITING, then its prompt goes through the model in chunks (PREFILL), one chunk in flight at a time, then
one token at a time (DECODE). Whenever KV blocks run out, the last one in order (of arrival, or of priority and
arrival) gives its blocks back and waits again with all tokens that it has (preemption): it loses time, never a token.
Since the first in order is never preempted while others run, and any sequence alone fits, somebody always makes
progress.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from amoe.config import CacheConfig, SchedulerConfig
from amoe.core.block_manager import BlockManager, root_hash
from amoe.core.join import Join
from amoe.core.sequence import Sequence, SequenceStatus, SequenceTable
from amoe.core.token_slots import TokenSlots, TokenTable
from amoe.core.waiting_line import WaitingLine
from amoe.policy.admission import place_in_line
from amoe.types import BoolArray, Int32Array, Int64Array, SamplingParams

_BEFORE_ALL = 1 << 62  # subtracted from an arrival: nobody's reader waits longer than one who has begun to read


@dataclass(slots=True)
class Entry:
    """Tokens that start an iteration: `decodes` [n] slots of single tokens, and a slot array per prefill chunk."""

    decodes: Int32Array
    chunks: list[Int32Array] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(chunk) for chunk in self.chunks)


class Batcher:
    """Owns the sequences of one attention worker, their rows, token slots and KV blocks.

    Args:
        has_capacity: best-effort sequences may lose pairs at any time, so that their KV is of use to each other alone.
            Without: only while nobody holds an expert, which must not outlast that in anybody's KV.
    """

    def __init__(
        self,
        scheduler: SchedulerConfig,
        cache: CacheConfig,
        num_blocks: int,
        max_model_len: int,
        num_owners: int,
        *,
        has_capacity: bool = False,
    ) -> None:
        self._has_capacity = has_capacity
        self._scheduling_policy = scheduler.scheduling_policy
        self._caching = cache.enable_prefix_caching
        self.max_prefill_tokens = scheduler.max_num_batched_tokens  # in flight; may change between two starts
        self.max_model_len = max_model_len
        self.blocks = BlockManager(num_blocks, cache.block_size)
        self.slots = TokenSlots(scheduler.num_token_slots)
        self.tokens = TokenTable(scheduler.num_token_slots)
        self.join = Join(scheduler.num_token_slots, num_owners, scheduler.num_lanes)
        self.table = SequenceTable(scheduler.max_num_seqs, max_model_len, cache.block_size)
        self.waiting = WaitingLine()
        self.running: dict[int, Sequence] = {}
        self.members: dict[int, Int32Array] = {}  # slots of each chunk in flight, by leader
        self.admitted: list[Sequence] = []  # since the shell last took them: they have a new row
        self.num_preemptions = 0
        self._decode_ready: BoolArray = np.zeros(scheduler.max_num_seqs, np.bool_)
        self._num_blocks: Int64Array = np.zeros(scheduler.max_num_seqs, np.int64)
        self._prefilling: list[Sequence] = []  # no chunk in flight, more to come
        self._prefill_in_flight = 0
        self._frontier = 0
        self._arrivals = 0
        self._refused = (-1, 0)  # request that did not fit, and the block manager's changes then

    # ---- sequences come and go

    def add(
        self,
        request_id: int,
        token_ids: Int32Array,
        params: SamplingParams,
        sibling_of: int | None = None,
        *,
        num_generated: int = 0,
        num_routed: int = 0,
    ) -> Sequence:
        """A new sequence waits. The caller has checked that prompt and output fit `max_model_len`.

        Args:
            sibling_of: a request with the same prompt that came before: its KV is shared, once it is there.
            num_generated: of `token_ids`, those that it has generated at another worker, where it has begun: it is as
                if it had been preempted here, and goes before all that have not begun.
            num_routed: leading tokens whose experts have been told there.
        """
        self._arrivals += 1
        arrival = self._arrivals - _BEFORE_ALL if num_generated else self._arrivals
        order = place_in_line(self._scheduling_policy, params.priority, arrival)
        sequence = Sequence(request_id, params, token_ids, len(token_ids) - num_generated, order)
        sequence.num_routed = num_routed
        if num_generated:  # all that was to be told of the prompt came before the first token
            sequence.num_scored = sequence.unscored.stop
        if sibling_of is not None and self._waits_for(sequence, sibling_of):
            self.waiting.add_aside(sequence, sibling_of)
        else:
            self.waiting.add(sequence)
        return sequence

    def _waits_for(self, sequence: Sequence, leader_id: int) -> bool:
        """Join the group of a sibling. Whether it is about to compute KV that this sequence can use."""
        if sequence.num_sparable <= self.blocks.block_size:  # shorter than what could be shared
            return False
        sequence.group = leader_id
        leader = self.running.get(leader_id) or self.waiting.find(leader_id)
        if leader is None:
            return False
        leader.group = leader_id
        if leader.status is not SequenceStatus.DECODE:
            return True
        self._commit(leader)
        return False

    def take_admitted(self) -> list[Sequence]:
        """Sequences that have got a row since the last call, some perhaps aborted or preempted again (row -1)."""
        admitted, self.admitted = self.admitted, []
        return admitted

    def abort(self, request_id: int) -> Sequence | None:
        """Free a sequence at any stage of its life. Returns it, or None if it is not here (any more)."""
        sequence = self.running.get(request_id)
        if sequence is not None:
            self._retire(sequence)
            return sequence
        sequence = self.waiting.find(request_id)
        if sequence is not None:
            self.waiting.remove(sequence)
            self._end(sequence)
        return sequence

    def _retire(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.FINISHED
        self.waiting.let_in(sequence.request_id)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.token_ids = self._give_back(sequence)
        sequence.status = SequenceStatus.WAITING
        self.waiting.add(sequence)
        sequence.life.num_preemptions += 1
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> Int32Array:
        """Take slots, blocks and row of a running sequence; returns its tokens."""
        if len(sequence.slots):
            leader = int(self.tokens.leader[sequence.slots[0]])
            if leader in self.members:
                self._prefill_in_flight -= len(self.members.pop(leader))
            self._release_slots(sequence.slots)
            sequence.slots = np.empty(0, np.int32)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._decode_ready[sequence.row] = False
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.hashes = [], []
        del self.running[sequence.request_id]
        return self.table.leave(sequence)

    def _release_slots(self, slots: Int32Array) -> None:
        self.join.cancel(slots)
        self.slots.release(slots)

    # ---- iterations start

    @property
    def num_ready(self) -> int:
        """Sequences that `start` could bring a step further; an estimate from above."""
        return self.num_decodes_ready + len(self._prefilling) + len(self.waiting) - self.waiting.num_aside

    @property
    def num_decodes_ready(self) -> int:
        """Those of them that decode."""
        return int(self._decode_ready.sum())

    def start(self, now: float = 0.0, max_decodes: int | None = None) -> Entry:
        """Tokens that start an iteration now: decode tokens that are due, then prefill chunks within the budget."""
        preempted = self.num_preemptions
        entry = Entry(self._start_decodes(max_decodes))
        for sequence in list(self._prefilling):
            if self._prefill_budget == 0:
                return entry
            self._prefilling.remove(sequence)
            entry.chunks.append(self._start_chunk(sequence))
        # Whoever has just been preempted would take back the blocks that were needed.
        if self.num_preemptions == preempted:
            while self._prefill_budget > 0 and self._admit_next(now):
                entry.chunks.append(self._start_chunk(self._prefilling.pop()))
        return entry

    def see_iteration(self, iteration: int) -> None:
        """Some home has tokens in this iteration. Homes count their own: without it, one that has been idle would come
        back with the least progress of all, and expert workers would serve it alone until it has caught up."""
        self._frontier = max(self._frontier, iteration)

    @property
    def _prefill_budget(self) -> int:
        return max(0, self.max_prefill_tokens - self._prefill_in_flight)

    def _start_decodes(self, limit: int | None) -> Int32Array:
        self._grow(np.flatnonzero(self._decode_ready))
        rows = np.flatnonzero(self._decode_ready)
        if limit is not None and len(rows) > limit:  # whoever was left out goes first the next time
            rows = np.sort(rows[np.argsort(self.tokens.iteration[self.table.slot[rows]], kind="stable")[:limit]])
        if len(rows) == 0:
            return np.empty(0, np.int32)
        slots = self.table.slot[rows]
        self.slots.renew(slots)
        self.tokens.position[slots] = self.table.num_tokens[rows] - 1
        # Whoever is far behind, because this home was idle while others were not, must not take precedence for long.
        iterations = np.maximum(self.tokens.iteration[slots] + 1, self._frontier - 1)
        self.tokens.iteration[slots] = iterations
        self.see_iteration(int(iterations.max()))
        self._decode_ready[rows] = False
        return slots

    def _sequence_at(self, row: int) -> Sequence:
        sequence = self.table.sequences[row]
        assert sequence is not None, f"row {row} holds no sequence"
        return sequence

    def _grow(self, rows: Int64Array) -> None:
        """Give the sequences of `rows` the block for their next token, preempting from the back where none is left."""
        short = rows[self.table.num_tokens[rows] > self._num_blocks[rows] * self.blocks.block_size]
        for sequence in sorted((self._sequence_at(row) for row in short), key=lambda s: s.order):
            while sequence.status is SequenceStatus.DECODE:
                blocks = self.blocks.allocate(1)
                if blocks is not None:
                    self.table.block_table[sequence.row, len(sequence.blocks)] = blocks[0]
                    sequence.blocks += blocks
                    self._num_blocks[sequence.row] += 1
                    break
                self._preempt(max(self.running.values(), key=lambda s: s.order))

    def _admit_next(self, now: float) -> bool:
        """Give the first waiting sequence a row and blocks for all its tokens, if there are any."""
        sequence = self.waiting.first
        if sequence is None or self.table.num_free_rows == 0:
            return False
        attempt = (sequence.request_id, self.blocks.num_changes)
        if attempt == self._refused:  # hashing a long prompt again would cost every turn of the loop
            return False
        count = len(sequence.token_ids)
        found, hashes = self._match_prefix(sequence)
        missing = self.blocks.blocks_for(count) - len(found)
        if missing > self.blocks.num_available_beside(found):
            self._refused = attempt
            return False
        self.waiting.remove(sequence)
        self.blocks.acquire(found)
        sequence.blocks = found + (self.blocks.allocate(missing) or [])
        sequence.hashes = hashes
        num_found = len(found) * self.blocks.block_size
        if self._caching and sequence.num_sparable:
            self.blocks.count_lookup(count, num_found)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_found
            sequence.life.admitted_at = now
        self.table.enter(sequence)
        self.table.num_computed[sequence.row] = num_found
        self._num_blocks[sequence.row] = len(sequence.blocks)
        sequence.status = SequenceStatus.PREFILL
        self.running[sequence.request_id] = sequence
        self._prefilling.append(sequence)
        self.admitted.append(sequence)
        return True

    def _match_prefix(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """Blocks that hold KV of its first tokens, and their names. None of tokens that have to be seen again."""
        root, num_sparable = self._root_of(sequence), sequence.num_sparable
        if root is None or num_sparable == 0:
            return [], []
        return self.blocks.match_prefix(sequence.token_ids[: num_sparable + 1], root)

    def _root_of(self, sequence: Sequence) -> bytes | None:
        """Under which KV blocks are found again; None: they are not."""
        if not self._caching and sequence.group is None:
            return None
        params = sequence.params
        return root_hash(
            best_effort=self._has_capacity and params.capacity != "exact",
            salt=params.cache_salt,
            group=None if self._caching else sequence.group,
        )

    def _start_chunk(self, sequence: Sequence) -> Int32Array:
        row = sequence.row
        start, end = int(self.table.num_computed[row]), int(self.table.num_tokens[row])
        count = min(end - start, self._prefill_budget)
        slots = self.slots.allocate(count)
        tokens = self.tokens
        tokens.row[slots] = row
        tokens.position[slots] = np.arange(start, start + count)
        # A newcomer joins behind the decode tokens, and does not push the frontier away from itself.
        tokens.iteration[slots] = self._frontier + 1
        # The last token leads: it is the one that may go on to the head alone.
        tokens.leader[slots] = slots[-1]
        tokens.in_chunk[slots] = True
        tokens.drop_first[slots] = False
        for first, last in sequence.params.droppable_spans:
            tokens.drop_first[slots[max(0, first - start) : max(0, last - start)]] = True
        unscored = sequence.unscored
        tokens.is_scored[slots] = False
        tokens.is_scored[slots[max(0, unscored.start - start) : max(0, unscored.stop - start)]] = True
        tokens.wants_logits[slots] = tokens.is_scored[slots]
        tokens.wants_logits[slots[-1]] |= start + count == end
        self.members[int(slots[-1])] = slots
        sequence.slots = slots
        self._prefill_in_flight += count
        return slots

    # ---- iterations end

    def finish_chunk(self, leader: int) -> None:
        """The chunk has passed the last attention block: its KV is complete, and only tokens that want logits go on."""
        slots = self.members[leader]
        row = int(self.tokens.row[leader])
        sequence = self._sequence_at(row)
        self.table.num_computed[row] = self.tokens.position[leader] + 1
        self._commit(sequence)
        if not self.tokens.is_scored[slots].any():
            self._end_chunk(leader)
            return
        wanted = self.tokens.wants_logits[slots]
        self._release_slots(slots[~wanted])
        self._prefill_in_flight -= len(slots) - int(wanted.sum())
        self.members[leader] = sequence.slots = slots[wanted]

    def finish_scoring(self, slots: Int32Array) -> None:
        """The head has given the log-probabilities behind the tokens in `slots` [n]: their chunks are through."""
        for leader in np.unique(self.tokens.leader[slots]).tolist():
            sequence = self._sequence_at(int(self.tokens.row[leader]))
            sequence.num_scored = int(self.tokens.position[leader]) + 1
            self._end_chunk(leader)

    def _end_chunk(self, leader: int) -> None:
        """Of a chunk's slots, only that of a last prompt token is needed any more."""
        slots = self.members.pop(leader)
        row = int(self.tokens.row[leader])
        sequence = self._sequence_at(row)
        self._prefill_in_flight -= len(slots)
        if self.tokens.is_scored[leader] or not self.tokens.wants_logits[leader]:
            self._release_slots(slots)
            sequence.slots = np.empty(0, np.int32)
            self._prefilling.append(sequence)
            return
        self._release_slots(slots[:-1])
        sequence.slots = slots[-1:]
        sequence.status = SequenceStatus.DECODE
        self.table.slot[row] = leader
        self.tokens.in_chunk[leader] = False
        self.tokens.drop_first[leader] = False
        self.waiting.let_in(sequence.request_id)

    def extend(self, slots: Int32Array, token_ids: Int64Array, finished: BoolArray) -> None:
        """The head has sampled `token_ids` [n] for the tokens in `slots` [n]; sequences `finished` [n] end here."""
        rows = self.tokens.row[slots]
        lens = self.table.num_tokens[rows]
        self.table.tokens[rows, lens] = token_ids
        self.table.num_tokens[rows] = lens + 1
        self.table.num_computed[rows] = lens
        self._decode_ready[rows] = ~finished
        for row in rows[lens % self.blocks.block_size == 0]:
            self._commit(self._sequence_at(row))
        for row in rows[finished]:
            self._retire(self._sequence_at(row))

    def _commit(self, sequence: Sequence) -> None:
        """Name the blocks of a sequence that have become full and are computed in every layer."""
        root = self._root_of(sequence)
        if root is None or (not self._has_capacity and self.table.has_lost(sequence.row)):
            return
        size = self.blocks.block_size
        full = int(self.table.num_computed[sequence.row]) // size
        for index in range(len(sequence.hashes), full):
            parent = sequence.hashes[-1] if sequence.hashes else root
            token_ids = self.table.tokens[sequence.row, index * size : (index + 1) * size]
            sequence.hashes.append(self.blocks.commit(sequence.blocks[index], parent, token_ids))
