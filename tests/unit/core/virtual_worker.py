"""What the engine's worker does around a `WorkerCore`, over the model of integers.

No process, no thread, no tensor. What the engine keeps (residuals, partials, slab, KV cache) is kept here in the same
layout and indexed by the same numbers, so that a wrong number is a wrong token.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np

from amoe.config import EngineConfig
from amoe.core.members import Roster
from amoe.core.routed_experts import take_routed
from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep, Step
from amoe.core.worker import ModelShape, WorkerCore
from amoe.types import Batch, BatchKind
from tests.unit.core import fake_model
from tests.unit.core.fake_model import Oracle
from tests.unit.core.scenario import Request, Scenario

COLUMNS = ("slots", "generations", "iterations", "expert_ids", "expert_weights")


class RestlessWaves:
    """A `WaveController` without a reason."""

    def __init__(self, max_waves: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.max_waves = max_waves
        self.num_waves = self.random.randint(1, max_waves)

    def observe(self, tokens: int, now: float) -> None:
        assert tokens >= 0  # 0: prompts alone
        self.num_waves = self.random.randint(1, self.max_waves)


class VirtualWorker:
    """What the engine's worker does around a `WorkerCore`, in the fewest words."""

    def __init__(
        self, scenario: Scenario, rank: int, oracles: dict[int, Oracle], rejoin: tuple[int, Roster] | None = None
    ) -> None:
        placement, slots = scenario.placement, scenario.scheduler.num_token_slots
        spec, blocks = scenario.spec, scenario.num_blocks
        config = EngineConfig(
            model="fake",
            placement=placement,
            scheduler=scenario.scheduler,
            cache=scenario.cache,
            capacity=scenario.capacity,
            failure=scenario.failure,
            max_waiting=0,
        )
        shape = ModelShape(spec.sparse_layers, spec.num_experts)
        length = scenario.max_model_len
        waves = RestlessWaves(config.scheduler.max_waves, scenario.seed) if scenario.restless else None
        self.owners = scenario.owners() if rejoin is None else rejoin[1].owners
        self.core = WorkerCore(
            config,
            shape,
            rank,
            num_kv_blocks=blocks,
            max_model_len=length,
            wave_controller=waves,
            owners=self.owners if scenario.spare_slots or rejoin else None,
            incarnation=0 if rejoin is None else rejoin[0],
            incarnations=None if rejoin is None else rejoin[1].incarnations,
        )
        self.may_get_strays = bool(scenario.faults)  # tokens for experts that have moved
        self.spec, self.rank, self.oracles = spec, rank, oracles
        self.num_pairs = scenario.capacity.pairs_per_token(spec.top_k, spec.num_experts)
        self.max_tokens = {request.request_id: request.max_tokens for request in scenario.requests}
        self.unchecked = {r.request_id for r in scenario.requests if not r.exact and config.may_degrade}
        self.owner_of_rank = {owner: index for index, owner in enumerate(placement.owner_ranks)}
        self.block_size = scenario.cache.block_size
        self.keys = np.zeros((spec.num_layers, blocks * self.block_size), np.uint64)
        self.residual = np.zeros(slots, np.uint64)
        self.partials = np.zeros((len(placement.owner_ranks) + 1, slots), np.uint64)
        self.held = (self.owners == self.owner_of_rank.get(rank, -2)).any(axis=-1)  # [L, E]
        self.moe_inputs = np.zeros(slots, np.uint64)
        self.slab = np.zeros(len(placement.attention_ranks) * slots, np.uint64)
        self.streamed: dict[int, list[int]] = {}
        self.scored: dict[int, list[int]] = {}  # positions of the prompt that the head has seen, by request
        self.num_routed: dict[int, int] = {}  # leading tokens whose experts have been told, by request
        self.num_prefilled: Counter[int] = Counter()  # prompt tokens that have entered the model, by request
        self.terminal: Counter[int] = Counter()
        self.sampling: dict[int, int] = {}  # request by row, as the engine keeps the sampling parameters

    @property
    def batcher(self):
        return self.core.batcher

    def add(self, request: Request) -> None:
        self.streamed[request.request_id] = []
        self.scored[request.request_id] = []
        self.num_routed[request.request_id] = 0
        prompt = np.asarray(request.prompt, np.int32)
        self.batcher.add(request.request_id, prompt, request.params, request.sibling_of)

    def resume(self, request: Request, streamed: list[int], scored: list[int], num_routed: int) -> None:
        """Go on with what another life, or another worker, has begun."""
        if not streamed:
            scored, num_routed = [], 0
        self.streamed[request.request_id] = list(streamed)
        self.scored[request.request_id] = list(scored)
        self.num_routed[request.request_id] = num_routed
        token_ids = np.asarray([*request.prompt, *streamed], np.int32)
        self.batcher.add(
            request.request_id, token_ids, request.params, num_generated=len(streamed), num_routed=num_routed
        )

    def apply(self, roster: Roster, now: float) -> list[Batch]:
        """Others serve from now on. Returns what is to be sent."""
        self.owners = roster.owners
        return [self._packed(outgoing, self.moe_inputs) for outgoing in self.core.on_roster(roster, now)]

    def retry(self, now: float) -> list[Batch]:
        """What is to be sent because answers are late."""
        if self.core.attention is None:
            return []
        return [self._packed(outgoing, self.moe_inputs) for outgoing in self.core.attention.recovery.retry(now)]

    def abort(self, request_id: int) -> None:
        if self.batcher.abort(request_id) is not None:
            self.terminal[request_id] += 1
        assert self.terminal[request_id] == 1, "neither aborted nor finished before"

    def receive(self, batch: Batch, now: float) -> None:
        kept = self.core.on_batch(batch, now)
        if kept is None or batch.payload is None:
            return
        if batch.kind is BatchKind.DISPATCH:
            self.slab[self.core.experts.slab_rows(batch)[kept]] = batch.payload[kept]
        else:
            self.partials[self.owner_of_rank[batch.src], batch.slots[kept]] = batch.payload[kept]

    def run(self, step: Step, now: float) -> list[Batch]:
        """Run a step and tell the core. Returns what is to be sent."""
        if isinstance(step, ForwardStep):
            self._run_forward(step)
            return []
        if isinstance(step, ExpertsStep):
            held = np.append(self.held[step.block.layer], True)[step.expert_ids].all(axis=1)
            assert held.all() or self.may_get_strays, "the expert does not live here"
            step = step if held.all() else step.only(held)
            inputs = self.slab[step.slab_rows]
            output = fake_model.run_experts(inputs, step.block.layer, step.expert_ids, step.expert_weights)
            return [self._packed(reply, output) for reply in step.replies]
        if isinstance(step, HeadStep):
            self._score(step)
            self._run_head(step)
            return []
        if step.num_tokens == 0:  # as the engine's home does: its router has seen nothing
            nothing = np.empty((0, 1))
            routed = nothing.astype(np.int64), nothing.astype(np.float32)
            return [self._packed(out, None) for out in self.core.attention.on_attention(step, *routed, now)]
        hidden = self._combined(step.block.layer, step.slots, step.rows, step.positions)
        layer = step.block.layer
        if layer == 0:
            self._count_prefilled(step)
        residual = fake_model.mix(hidden, self._attend(step, layer, hidden))
        if not self.spec.sparse_layers[layer]:
            self.residual[step.slots] = fake_model.mix(residual, fake_model.DENSE)
            return [self._packed(out, None) for out in self.core.attention.on_attention(step, None, None, now)]
        self.residual[step.slots] = residual
        moe_input = fake_model.mix(residual, fake_model.NORM)
        self.moe_inputs[step.slots] = moe_input
        topk_ids, topk_weights = fake_model.route(moe_input, layer, self.spec)
        scores = fake_model.scores(moe_input, layer, self.spec)
        outgoing = self.core.attention.on_attention(step, topk_ids, topk_weights, now, scores)
        return [self._packed(out, moe_input) for out in outgoing]

    def _run_forward(self, step: ForwardStep) -> None:
        """All layers, and the head: no other than those that it names get so far."""
        assert step.num_tokens > 0
        self._count_prefilled(step)
        hidden = fake_model.embed(self.batcher.table.tokens[step.rows, step.positions], step.positions)
        expert_ids = {}
        for layer, sparse in enumerate(self.spec.sparse_layers):
            residual = fake_model.mix(hidden, self._attend(step, layer, hidden))
            if layer == self.spec.num_layers - 1 and step.wanted is not None:
                residual = residual[step.wanted]
            if not sparse:
                hidden = fake_model.mix(residual, fake_model.DENSE)
                continue
            moe_input = fake_model.mix(residual, fake_model.NORM)
            expert_ids[layer], weights = fake_model.route(moe_input, layer, self.spec)
            hidden = fake_model.mix(residual, fake_model.run_experts(moe_input, layer, expert_ids[layer], weights))
        assert len(hidden) == step.num_wanted
        self.core.forward.on_forward(step, expert_ids)
        if step.head is None:
            assert len(hidden) == 0
            return
        rows = np.arange(len(hidden)) if step.head_rows is None else step.head_rows
        self.residual[step.head.slots] = hidden[rows]
        if step.head.prompt is not None:
            self.residual[step.head.prompt.slots] = hidden[step.prompt_rows]
        self._score(step.head)
        self._run_head(step.head)

    def _count_prefilled(self, step: AttentionStep | ForwardStep) -> None:
        for span in step.chunks:
            self.num_prefilled[self.batcher.table.sequences[span.row].request_id] += span.end - span.start

    def _combined(self, layer, slots, rows=None, positions=None):
        """Hidden states [n] that enter a block: embeddings, or residuals with what the experts have said."""
        if self.core.forward is not None:  # they have said it within the step
            return self.residual[slots]
        if layer == 0:
            return fake_model.embed(self.batcher.table.tokens[rows, positions], positions)
        if not self.spec.sparse_layers[layer - 1]:
            return self.residual[slots]
        answered = self.batcher.join.dispatched[slots].T
        total = np.where(answered, self.partials[:, slots], np.uint64(0)).sum(axis=0, dtype=np.uint64)
        return fake_model.mix(self.residual[slots], total)

    def _attend(self, step: AttentionStep | ForwardStep, layer: int, hidden):
        """Sums [n] over the KV entries up to each token; every entry is compared with the oracle's."""
        spans = [(i, i + 1, int(row)) for i, row in enumerate(step.rows[: step.num_decodes])]
        spans += [(span.start, span.end, span.row) for span in step.chunks]
        assert [row for start, end, row in spans for _ in range(start, end)] == step.rows.tolist()
        sums = np.zeros(step.num_tokens, np.uint64)
        for start, end, row in spans:
            positions = step.positions[start:end].tolist()
            assert positions == list(range(positions[0], positions[-1] + 1))
            upto = positions[-1] + 1
            where = np.arange(upto)
            places = self.batcher.table.block_table[row, where // self.block_size] * self.block_size
            places = places + where % self.block_size
            sequence = self.batcher.table.sequences[row]
            written = set((places[positions[0] :] // self.block_size).tolist())
            for other in self.batcher.running.values():
                assert other is sequence or written.isdisjoint(other.blocks), "a shared block is written to"
            self.keys[layer, places[positions[0] :]] = fake_model.key(hidden[start:end], layer)
            oracle = self.oracles[sequence.request_id]
            if sequence.request_id not in self.unchecked:
                known = oracle.keys[layer][:upto]
                assert self.keys[layer, places].tolist() == known, "somebody else's KV, or a wrong one"
            sums[start:end] = self.keys[layer, places].cumsum(dtype=np.uint64)[positions[0] :]
        return sums

    def _score(self, step: HeadStep) -> None:
        """Every prompt token but the last comes once, in order, and before anything is sampled."""
        if step.prompt is None:
            return
        hidden = self._combined(step.block.layer, step.prompt.slots)
        places = zip(step.prompt.rows.tolist(), step.prompt.positions.tolist(), hidden.tolist(), strict=True)
        for row, position, value in places:
            sequence = self.batcher.table.sequences[row]
            assert sequence.params.prompt_logprobs is not None, "nobody has asked"
            assert len(self.scored[sequence.request_id]) == position < sequence.prompt_len - 1
            self.scored[sequence.request_id].append(position)
            if sequence.request_id not in self.unchecked:
                assert value == self.oracles[sequence.request_id].hidden[position], "a wrong hidden state"

    def _run_head(self, step: HeadStep) -> None:
        self.sampling |= {s.row: s.request_id for s in self.batcher.take_admitted() if s.row >= 0}
        token_ids = fake_model.sample(self._combined(step.block.layer, step.slots), self.spec)
        finished = np.zeros(len(step.slots), np.bool_)
        for index, row in enumerate(step.rows.tolist()):
            sequence = self.batcher.table.sequences[row]
            assert self.sampling[row] == sequence.request_id, "sampled with somebody else's parameters"
            if sequence.params.prompt_logprobs is not None:
                assert len(self.scored[sequence.request_id]) == sequence.prompt_len - 1, "sampled before it was scored"
            self._check_routed(sequence)
            streamed = self.streamed[sequence.request_id]
            streamed.append(int(token_ids[index]))
            if sequence.request_id in self.unchecked:
                is_last = len(streamed) == self.max_tokens[sequence.request_id]
            else:
                generated = self.oracles[sequence.request_id].generated
                assert streamed == generated[: len(streamed)], f"request {sequence.request_id} got wrong tokens"
                is_last = len(streamed) == len(generated)
            if is_last:
                finished[index] = True
                self.terminal[sequence.request_id] += 1
        (self.core.forward or self.core.attention).on_head(step, token_ids, finished)

    def _check_routed(self, sequence) -> None:
        """All tokens up to the one before the sampled one have been told, each once, with the oracle's experts."""
        told = np.frombuffer(take_routed(sequence), "<i2").reshape(-1, sum(self.spec.sparse_layers), self.num_pairs)
        start = self.num_routed[sequence.request_id]
        self.num_routed[sequence.request_id] += len(told)
        if not sequence.params.return_routed_experts:
            assert len(told) == 0
            return
        end = self.num_routed[sequence.request_id]
        assert end == self.batcher.table.num_tokens[sequence.row]
        if sequence.request_id in self.unchecked:
            return
        wanted = np.array(self.oracles[sequence.request_id].routed[start:end])
        wanted = np.pad(wanted, ((0, 0), (0, 0), (0, self.num_pairs - wanted.shape[2])), constant_values=-1)
        skipped = np.zeros(wanted.shape, np.bool_)
        if self.spec.sparse_layers[-1]:  # prompt tokens without logits do not go to the last experts
            is_scored = sequence.params.prompt_logprobs is not None
            skipped[: max(0, 0 if is_scored else sequence.prompt_len - 1 - start), -1] = True
        assert np.where(skipped, -1, wanted).tolist() == told.tolist(), "wrong experts"

    def _packed(self, outgoing, output) -> Batch:
        """A copy that shares no memory with the core, with its payload."""
        batch = outgoing.batch
        columns = {name: getattr(batch, name).copy() for name in COLUMNS}
        assert batch.kind is BatchKind.ANNOUNCE or batch.count == len(batch.slots)
        packed = replace(batch, **columns)
        if outgoing.rows is not None and batch.count:
            packed.payload = output[outgoing.rows].copy()
            assert len(packed.payload) == batch.count
        return packed
