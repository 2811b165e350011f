"""The shell of a worker: one loop that moves batches and messages between the core, the kernels and the outside."""

from __future__ import annotations

import select
from collections.abc import Sequence

import torch

from amoe.clock import Clock
from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep, Outgoing, Step
from amoe.core.worker import WorkerCore
from amoe.engine.attention_side import AttentionSide
from amoe.engine.executor import ExpertBlocks
from amoe.engine.expert_loading import ExpertLoading
from amoe.engine.forward import ForwardExecutor
from amoe.engine.home import Home
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Alive,
    Applied,
    ControlPort,
    Heartbeat,
    HoldExperts,
    Steer,
    Stop,
    Topology,
    Unanswered,
)
from amoe.engine.pulse import PulseThread, Turn
from amoe.engine.step_times import StepTimes
from amoe.engine.topology import peers_of, roster_of
from amoe.engine.worker_stats import StatsKeeper
from amoe.transport.base import Transport
from amoe.types import Batch, BatchKind, Int32Array

HEARTBEAT_S = 0.5
CONTROL_INTERVAL_S = 0.001  # a busy worker looks at its control channel this often


class Worker:
    """Drives one `WorkerCore`. `run` is the loop, `turn` one round of it.

    Args:
        home: requests and head; None at an expert worker.
        attention: the attention side; None at an expert worker.
        experts: the expert side; None at an attention worker.
        forward: all layers in one step; None at a worker that runs block by block. One that does not has no sides.
        sign_s: between two signs of life.
        may_compile: see `StepTimes`.
        loading: changes the experts that the expert side holds; None: they stay as they are.
    """

    def __init__(
        self,
        core: WorkerCore,
        home: Home | None,
        attention: AttentionSide | None,
        experts: ExpertBlocks | None,
        *,
        transport: Transport,
        control: ControlPort,
        clock: Clock,
        stats: StatsKeeper,
        sign_s: float = HEARTBEAT_S,
        may_compile: bool = False,
        loading: ExpertLoading | None = None,
        forward: ForwardExecutor | None = None,
    ) -> None:
        self.core = core
        self.stats = stats
        self._home = home
        self._attention = attention
        self._experts = experts
        self._forward = forward
        self._loading = loading
        self._transport = transport
        self._control = control
        self._clock = clock
        self._sign_s = sign_s
        self._next_heartbeat = self._next_sign = 0.0
        self._next_control = 0.0
        self._stopped = False
        self._turn = Turn()
        self._times = StepTimes(1 if forward is None else forward.num_layers, may_compile=may_compile)

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    def run(self) -> None:
        """Serve until the server says `Stop` or goes away."""
        poller = select.poll()
        poller.register(self._transport.fileno(), select.POLLIN)
        poller.register(self._control.fileno(), select.POLLIN)
        if self._home is not None:
            self._home.warm_up()
        try:
            with PulseThread(self._turn, self._times, self._control, self._clock, self._sign_s, self._progress):
                while not self._stopped:
                    if not self.turn():
                        self._sleep(poller)
        finally:
            if self._home is not None:
                self._home.close()
            if self._loading is not None:
                self._loading.close()

    def _progress(self) -> int:
        """How far forward steps have come, for the thread beside the loop."""
        return 0 if self._forward is None else self._forward.progress

    def _sleep(self, poller: select.poll) -> None:
        """Until something comes, or the next timer."""
        self._turn.since = None
        now = self._clock.now()
        poller.poll(self._seconds_to_sleep(now) * 1000)
        self._next_control = 0.0
        seconds = self._clock.now() - now
        self.stats.slept(seconds, self.core.reason_to_wait)
        self.stats.waited(self.core.queues.depth, seconds)

    def _seconds_to_sleep(self, now: float) -> float:
        """Until the next sign of life, or until somebody has waited long enough for another worker."""
        deadline = self.core.next_deadline(now)
        until = self._next_sign if deadline is None else min(self._next_sign, deadline)
        if (self._home is not None and self._home.is_compiling) or (
            self._loading is not None and self._loading.is_busy
        ):
            until = min(until, now + CONTROL_INTERVAL_S)
        return max(0.0, until - now)

    @torch.inference_mode()
    def turn(self) -> bool:
        """Take what has come, run one block. False if there was nothing to do."""
        self._turn.since = now = self._clock.now()
        self.stats.loops += 1
        if now >= self._next_control:
            self._next_control = now + CONTROL_INTERVAL_S
            self._handle_messages()
        batches = self._transport.poll()
        self.stats.arrived(batches)
        for batch in batches:
            self._receive(batch, now)
        if self._loading is not None and self._loading.is_busy:
            for message in self._loading.poll():
                self._control.send(message)
        self._send(self.core.start(now), None)
        step = self.core.next_step(now)
        if step is not None:
            self._turn.step = step
            self._run(step, now)
            self._turn.step = None
            self._times.observe(step, self._clock.now() - now)
        self._transport.flush()
        if now >= self._next_sign:
            self._next_sign = now + self._sign_s
            self._give_sign(now)
            self._look_after_answers(now)
        return step is not None or bool(batches)

    def _give_sign(self, now: float) -> None:
        """The loop turns: every now and then, all that there is to say. `now`: when the turn began; what has waited
        for an expert has done so up to its end."""
        self._turn.signed_at = ended = self._clock.now()
        if now < self._next_heartbeat:
            self._control.send(Alive(self.core.queues.waited_for_experts_s(ended)))
            return
        self._next_heartbeat = now + HEARTBEAT_S
        self._control.send(Heartbeat(self.stats.snapshot(self.core, ended)))

    def _receive(self, batch: Batch, now: float) -> None:
        kept = self.core.on_batch(batch, now)
        if kept is None or batch.payload is None:
            return
        if batch.kind is BatchKind.RESULT and self._attention is not None:
            self._attention.keep(batch, kept)
        elif self._experts is not None and self.core.experts is not None:
            self._experts.keep(batch, self.core.experts.slab_rows(batch), kept)

    def _run(self, step: Step, began: float) -> None:
        """Run a step, and tell who counts. `began`: with the turn, whose polling is a part of the price of a step."""
        if isinstance(step, ForwardStep):
            self._run_forward(step, began)
            return
        self._run_block(step)
        seconds = self._clock.now() - began
        self.stats.observe(step, seconds)
        self.stats.waited(self.core.queues.depth, seconds, busy=True)
        self.core.observe(step, seconds)

    def _run_forward(self, step: ForwardStep, began: float) -> None:
        assert self.core.forward is not None and self._forward is not None and self._home is not None
        passed = self._forward.forward(step)
        self.core.forward.on_forward(step, passed.expert_ids)
        if step.head is not None:
            self._home.run_head(step.head)
        seconds = self._clock.now() - began
        self.stats.observe_forward(step, passed.expert_ids, passed.seconds, seconds)
        self.core.forward.observe(step, seconds)

    def _run_block(self, step: AttentionStep | HeadStep | ExpertsStep) -> None:
        if isinstance(step, ExpertsStep):
            assert self._experts is not None
            if self._loading is not None:
                step = self._loading.answerable(step)
            self._send(step.replies, self._experts.experts(step) if step.num_tokens else None)
            return
        if isinstance(step, AttentionStep):
            assert self._attention is not None
            self._send(*self._attention.run(step, self._clock.now()))
        else:
            assert self._home is not None
            self._home.run_head(step)

    def _send(self, outgoing: Sequence[Outgoing], payload: torch.Tensor | None) -> None:
        for item in outgoing:
            batch, rows = item.batch, item.rows
            if not self.core.members.has(batch.dst):
                continue  # markers for those who are not there yet, or answers to those who are there no more
            self.core.members.stamp(batch)
            # A dispatch to this very worker needs no payload: attention has left it in the slab.
            local_dispatch = batch.kind is BatchKind.DISPATCH and batch.dst == batch.src
            if payload is not None and rows is not None and batch.count and not local_dispatch:
                batch.payload = payload[rows] if isinstance(rows, slice) else _take_rows(payload, rows)
            self.stats.sent(batch)
            self._transport.send(batch)

    def _look_after_answers(self, now: float) -> None:
        """Ask again for answers that have been owed for long, and tell the server whose."""
        core, side = self.core.attention, self._attention
        if core is None or side is None:
            return
        for rank, seconds in core.recovery.unanswered(now):
            self._control.send(Unanswered(rank, seconds))
        self._send(core.recovery.retry(now), side.moe_inputs)

    def _on_topology(self, message: Topology) -> None:
        """Other workers serve from now on: what was sent to those who are gone goes elsewhere."""
        self._transport.update(peers_of(message))
        outgoing = self.core.on_roster(roster_of(message, self.core.num_experts), self._clock.now())
        if self._attention is not None:
            self._attention.on_topology(message.version)
            self._send(outgoing, self._attention.moe_inputs)
        self._control.send(Applied(message.version))

    def _handle_messages(self) -> None:
        if self._home is not None:
            self._home.poll()
        for message in self._control.receive():
            if isinstance(message, Stop):
                self._stopped = True
                continue
            if isinstance(message, Topology):
                self._on_topology(message)
                continue
            if isinstance(message, HoldExperts) and self._forward is not None:
                self._control.send(self._forward.hold(message))
                continue
            if isinstance(message, HoldExperts):
                assert self._loading is not None, "only workers that may hold experts are told to"
                self._loading.order(message)
                continue
            assert self._home is not None, "only attention workers take requests"
            if isinstance(message, AddRequest):
                self._home.add(message)
            elif isinstance(message, AbortRequests):
                self._home.abort(message.request_ids)
            elif isinstance(message, Steer) and self._attention is not None:
                self._attention.steer(message)


def _take_rows(payload: torch.Tensor, rows: Int32Array) -> torch.Tensor:
    """payload[rows]; `payload` itself if that is all of it: rows ascend."""
    if len(rows) == len(payload):
        return payload
    return payload.index_select(0, torch.from_numpy(rows).to(payload.device))
