"""The deterministic heart of a worker: batches and requests in, steps and batches out. No tensor, no clock, no I/O.

A shell (the engine's process, or the simulator) drives it:

    on_batch(batch, now)        a batch has arrived
    start(now)                  let sequences start their next iteration
    next_step(now)              which block to run, on which tokens
    next_deadline(now)          when to try again, though nothing arrives
    attention.on_attention(...) / attention.on_head(...)   what the step has brought; `ExpertsStep.replies` go home
    forward.on_forward(...) / forward.on_head(...)         likewise, in the schedule `forward`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoe.config import EngineConfig
from amoe.core.attention import AttentionCore
from amoe.core.backlog import WorkMeter
from amoe.core.batcher import Batcher
from amoe.core.capacity import HomeCapacity
from amoe.core.decisions import DecisionCounts
from amoe.core.expert_waves import ExpertWaves
from amoe.core.experts import ExpertsCore
from amoe.core.forward import ForwardCore
from amoe.core.home_waves import HomeWaves
from amoe.core.lockstep import ExpertsBarrier, HomeBarrier
from amoe.core.members import NOBODY, Members, Roster
from amoe.core.micro_queue import MicroQueues
from amoe.core.owner_pace import OwnerPace
from amoe.core.replica_shares import ReplicaShares
from amoe.core.steps import BlockStep, ForwardStep, Outgoing, Step
from amoe.core.waves import WaveController, WaveGates, make_controller
from amoe.errors import TransportError
from amoe.policy.decision import Reason, reason_to_run
from amoe.policy.placement import place_experts
from amoe.policy.scheduler import NEVER, QueueView, choose_block, make_policy, num_stages
from amoe.types import Batch, BatchKind, BlockKind, BoolArray, Int16Array


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the core has to know of a model.

    Attributes:
        renormalises: its routers give the top-k weights that sum to one.
    """

    sparse_layers: Sequence[bool]
    num_experts: int
    renormalises: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.sparse_layers)

    @property
    def last_sparse_layer(self) -> int:
        return max(layer for layer, is_sparse in enumerate(self.sparse_layers) if is_sparse)


class WorkerCore:
    """All decisions of the worker `rank`.

    Args:
        num_kv_blocks, max_model_len: of its KV cache, if it is an attention worker.
        wave_controller: chooses the number of waves; None: as the configuration says.
        owners: [num_layers, num_experts, R] where experts and their replicas live; None: no replicas.
        incarnation: which life of this worker it is.
        incarnations: by rank, of the others that it finds when it comes late; None: it starts with the others.

    Attributes:
        is_late: it has come while others served.
        members: who is there.
        attention, experts: the sides of a worker that runs block by block; None: it does not have that side.
        forward: the one of a worker that takes its tokens through the whole model, and has no other.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: ModelShape,
        rank: int,
        *,
        num_kv_blocks: int,
        max_model_len: int,
        wave_controller: WaveController | None = None,
        owners: Int16Array | None = None,
        incarnation: int = 0,
        incarnations: Sequence[int] | None = None,
    ) -> None:
        scheduler, placement = config.scheduler, config.placement
        homes = placement.attention_ranks
        self.rank = rank
        self.max_wait_s = scheduler.max_wait_s
        self.decisions = DecisionCounts()
        self.queues = MicroQueues(shape.num_layers, scheduler.num_lanes)
        self._config = config
        self._shape = shape
        self.is_late = incarnations is not None
        at_start = [0 if other < placement.num_workers else NOBODY for other in range(placement.num_ranks)]
        self.members = Members(rank, incarnation, at_start if incarnations is None else incarnations)
        self._num_stages = num_stages(shape.num_layers)
        self._home_barrier: HomeBarrier | None = None
        self._experts_barrier: ExpertsBarrier | None = None
        self._gates: WaveGates | None = None
        self._home_waves: HomeWaves | None = None
        self._expert_waves: ExpertWaves | None = None
        self._meter = WorkMeter(self.queues) if config.capacity.slack_s is not None else None
        self.attention: AttentionCore | None = None
        self.experts: ExpertsCore | None = None
        self.forward: ForwardCore | None = None
        if scheduler.schedule == "forward":
            self.forward = ForwardCore(self._make_batcher(num_kv_blocks, max_model_len), shape.sparse_layers)
            return
        self._policy = make_policy(scheduler, shape.num_layers)
        if scheduler.schedule == "waves":
            wave_controller = wave_controller or make_controller(scheduler)
            initial = wave_controller.num_waves
            self._gates = WaveGates(shape.num_layers, scheduler.num_lanes, homes[0], initial, scheduler.max_hold_s)
        if rank in homes:
            if owners is None:
                owners = place_experts(shape.num_layers, shape.num_experts, len(placement.expert_ranks))
            self.attention = self._make_attention(num_kv_blocks, max_model_len, owners, wave_controller)
        if rank in placement.owner_ranks:
            self.experts = self._make_experts()

    def _make_batcher(self, num_kv_blocks: int, max_model_len: int) -> Batcher:
        config = self._config
        return Batcher(
            config.scheduler,
            config.cache,
            num_kv_blocks,
            max_model_len,
            len(config.placement.owner_ranks) + 1,  # the last one is nobody
            has_capacity=config.capacity.is_on,
        )

    def _make_attention(
        self, num_kv_blocks: int, max_model_len: int, owners: Int16Array, wave_controller: WaveController | None
    ) -> AttentionCore:
        config, shape, rank = self._config, self._shape, self.rank
        scheduler, homes = config.scheduler, config.placement.attention_ranks
        owner_ranks = config.placement.owner_ranks
        batcher = self._make_batcher(num_kv_blocks, max_model_len)
        if scheduler.schedule == "lockstep":
            in_march = config.placement.expert_ranks  # nobody joins it
            self._home_barrier = HomeBarrier(rank, homes, in_march, shape.num_layers, scheduler.num_lanes)
        if self._gates is not None and wave_controller is not None:
            self._home_waves = HomeWaves(
                rank,
                homes,
                owner_ranks,
                shape.last_sparse_layer,
                join=batcher.join,
                queues=self.queues,
                gates=self._gates,
                controller=wave_controller,
                incarnation=self.members.incarnation,
            )
        replicas = ReplicaShares(owners, rank, len(owner_ranks), self._present_owners())
        return AttentionCore(
            rank=rank,
            owner_ranks=owner_ranks,
            replicas=replicas,
            sparse_layers=shape.sparse_layers,
            batcher=batcher,
            queues=self.queues,
            barrier=self._home_barrier,
            waves=self._home_waves,
            capacity=self._make_capacity(replicas, batcher),
            pace=OwnerPace(replicas, batcher.join, config.ridge_tokens) if config.steering.interval_s > 0 else None,
            failure=config.failure,
        )

    def _make_capacity(self, replicas: ReplicaShares, batcher: Batcher) -> HomeCapacity | None:
        config, owner_ranks = self._config, self._config.placement.owner_ranks
        if not config.may_degrade:
            return None
        return HomeCapacity(
            config.capacity,
            replicas,
            batcher,
            seed=config.seed,
            renormalise=self._shape.renormalises,
            local_owner=owner_ranks.index(self.rank) if self.rank in owner_ranks else None,
            degrades=config.failure.on_expert_loss == "reroute",
        )

    def _make_experts(self) -> ExpertsCore:
        scheduler, homes = self._config.scheduler, self._config.placement.attention_ranks
        if scheduler.schedule == "lockstep":
            self._experts_barrier = ExpertsBarrier(homes)
        if self._gates is not None:
            self._expert_waves = ExpertWaves(
                homes, self._shape.num_layers, self.queues, self._gates, is_late=self.is_late
            )
            for home, rank in enumerate(homes):
                if not self.members.has(rank):
                    self._expert_waves.on_home_changed(home, is_there=False)
        return ExpertsCore(
            rank=self.rank,
            home_ranks=homes,
            slots_per_home=scheduler.num_token_slots,
            queues=self.queues,
            barrier=self._experts_barrier,
            waves=self._expert_waves,
            meter=self._meter,
        )

    @property
    def batcher(self) -> Batcher | None:
        """Of the sequences whose home this worker is; None: it is nobody's."""
        if self.forward is not None:
            return self.forward.batcher
        return None if self.attention is None else self.attention.batcher

    def holds(self, kind: BlockKind) -> bool:
        """Blocks of this kind run here."""
        if self.forward is not None:
            return True
        return (self.experts if kind is BlockKind.EXPERTS else self.attention) is not None

    @property
    def num_experts(self) -> int:
        """Of each layer of the model."""
        return self._shape.num_experts

    @property
    def num_waves(self) -> int:
        """W as it is now; 0 in schedules without waves."""
        return 0 if self._gates is None else self._gates.num_waves

    @property
    def num_slips(self) -> int:
        """Times that a wave has gone on without somebody who kept it waiting for too long."""
        return sum(waves.num_slips for waves in (self._home_waves, self._expert_waves) if waves is not None)

    def on_batch(self, batch: Batch, now: float) -> BoolArray | None:
        """A batch has arrived.

        Returns:
            [n]: the rows whose payload has to be kept, the others are late or duplicates. None of an ANNOUNCE, and of
            a batch that another life of a worker has sent, or should have got.

        Raises:
            TransportError: the batch is none of this worker's business.
        """
        if not self.members.admits(batch):
            return None
        if batch.kind is BatchKind.RESULT and self.attention is not None:
            return self.attention.on_result(batch, now)
        if batch.kind is BatchKind.DISPATCH and self.experts is not None:
            return self.experts.on_dispatch(batch, now)
        if batch.kind is BatchKind.ANNOUNCE and (self._gates or self._home_barrier or self._experts_barrier):
            if self._gates is not None:
                self._gates.hear(batch)
            for side in (self._home_barrier, self._experts_barrier, self._home_waves, self._expert_waves):
                if side is not None:
                    side.on_announce(batch)
            return None
        raise TransportError(f"worker {self.rank} has no use for a {batch.kind.name} from worker {batch.src}")

    def on_roster(self, roster: Roster, now: float) -> list[Outgoing]:
        """Other workers serve from now on, or hold other experts.

        Returns:
            What this home has to send anew; the rows are token slots.
        """
        changed = self.members.update(roster.incarnations)
        if self.experts is not None:
            for rank in self._config.placement.attention_ranks:
                if rank in changed:
                    self.experts.on_home_changed(rank, is_there=self.members.has(rank))
        if self.attention is None:
            return []
        is_changed = np.array([rank in changed for rank in self._config.placement.owner_ranks])
        return self.attention.recovery.on_roster(roster.owners, self._present_owners(), is_changed, now)

    def _present_owners(self) -> BoolArray:
        return np.array([self.members.has(rank) for rank in self._config.placement.owner_ranks])

    def start(self, now: float) -> list[Outgoing]:
        """Let sequences start their next iteration. Returns announcements to send (waves and lockstep only)."""
        return [] if self.attention is None else self.attention.start(now)

    def next_step(self, now: float) -> Step | None:
        """The block to run now, with its tokens; None if none is ready. It may have no tokens left (after an abort)."""
        if self.forward is not None:
            return self._next_forward(self.forward, now)
        view = self._view(now)
        index = choose_block(self._policy, view, now, self.max_wait_s)
        if index is None:
            self.decisions.waited(self.reason_to_wait)
            return None
        kind = self.queues.block(index).kind
        self._count_decision(kind, view, index, now)
        if kind is BlockKind.EXPERTS:
            assert self.experts is not None
            return self.experts.experts_step(index)
        assert self.attention is not None
        if kind is BlockKind.HEAD:
            return self.attention.head_step(index)
        return self.attention.attention_step(index)

    def _next_forward(self, forward: ForwardCore, now: float) -> ForwardStep | None:
        step = forward.next_step(now)
        if step is None:
            self.decisions.waited(Reason.IDLE)
        else:
            self.decisions.ran_all()
        return step

    @property
    def reason_to_wait(self) -> Reason:
        """Why no block runs, if none is ready."""
        if self.queues.depth.any():
            return Reason.HELD
        if self.attention is None:
            return Reason.IDLE
        slots = self.attention.batcher.slots
        return Reason.AWAY if slots.num_free < slots.num_slots else Reason.IDLE

    def _count_decision(self, kind: BlockKind, view: QueueView, index: int, now: float) -> None:
        reason = reason_to_run(
            int(np.count_nonzero(view.ready)),
            is_open=self._gates is None or bool(self._gates.open.flat[index]),
            age_s=now - float(view.oldest[index]),
            max_wait_s=self.max_wait_s,
        )
        self.decisions.ran(kind, reason)

    def observe(self, step: BlockStep, seconds: float) -> None:
        """A step has taken so long. Needed only where capacity looks at backlogs."""
        if self._meter is not None:
            self._meter.observe(step.block.kind, step.num_tokens, seconds)

    def next_deadline(self, now: float) -> float | None:
        """When to call `start` and `next_step` again though no batch has come: the time at which somebody who waits for
        others goes on without them. None: nobody waits so. It may have passed."""
        if self._gates is None:
            return None
        deadlines = []
        if self._home_waves is not None and self.attention is not None:
            self._home_waves.refresh()
            deadlines.append(self._home_waves.deadline(self.attention))
        deadlines.append(self._gates.deadline(self.queues))
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _view(self, now: float) -> QueueView:
        if self._gates is not None:
            if self._home_waves is not None:
                self._home_waves.refresh()
            return self._gates.view(self.queues, now)
        if self._home_barrier is None and self._experts_barrier is None:
            return self.queues.view()
        depth = self.queues.depth
        ready = np.zeros(len(depth), np.bool_)
        kappa = np.full(len(depth), NEVER, np.int64)
        for barrier in (self._home_barrier, self._experts_barrier):
            for block, epoch in barrier.ready() if barrier is not None else ():
                index = self.queues.index(block)
                ready[index] = True
                kappa[index] = epoch * self._num_stages + index % self._num_stages
        return QueueView(ready, depth, self.queues.oldest, kappa)
