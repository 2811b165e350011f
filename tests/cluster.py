"""A cluster of real workers in one process: real models, kernels, cores and wire format, stepped in turn.

Deterministic and quick to start, so that the token-exactness matrix can be large; `tests/integration` runs a part of
it again on real processes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from amoe.clock import Clock
from amoe.config import EngineConfig
from amoe.engine.build import build_worker
from amoe.engine.emulated_device import served_shape
from amoe.engine.expert_placement import expert_owners
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Alive,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
    Steer,
    ToServer,
    ToWorker,
)
from amoe.transport.base import Transport
from amoe.transport.inproc import InprocFabric
from amoe.types import CapacityUsage, SamplingParams, SequenceTimes, TokenLogprobs
from tests.unit.core.scenario import random_shares


class FakeControl:
    """A `ControlPort` whose other end is this test."""

    def __init__(self) -> None:
        self.inbox: list[ToWorker] = []
        self.outbox: list[ToServer] = []
        self._fd = os.eventfd(0)

    def receive(self) -> list[ToWorker]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: ToServer) -> None:
        self.outbox.append(message)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


@dataclass
class Finished:
    """What became of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    num_cached_tokens: int = 0
    capacity: CapacityUsage | None = None
    routed_experts: bytes = b""
    times: list[SequenceTimes] = field(default_factory=list)


class Endpoints(Protocol):
    """What connects the workers."""

    def endpoint(self, rank: int) -> Transport:
        """The transport of one worker."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class InprocCluster:
    """Workers of `config`, driven by `run`. `wrap` may put a fault-injecting double around each transport; `fabric` may
    take the place of the one that copies batches from worker to worker, and `make_clock` of clocks that move by a step
    whenever they are read.

    Attributes:
        expected: kinds of messages that a healthy worker sends here.

    Where experts have replicas, every few turns another home is told to choose them by other shares.
    """

    expected: ClassVar[tuple[type, ...]] = (Outputs, Heartbeat, Alive, Ready, Loading)

    def __init__(
        self,
        config: EngineConfig,
        *,
        seed: int = 0,
        wrap: Callable[[Transport], Transport] = lambda transport: transport,
        fabric: Endpoints | None = None,
        make_clock: Callable[[], Clock] | None = None,
    ) -> None:
        num = config.placement.num_workers
        self.config = config
        self._owners = expert_owners(config, served_shape(config))
        self.fabric: Endpoints = fabric or InprocFabric(num)
        self.controls = [FakeControl() for _ in range(num)]
        self.workers = [
            build_worker(config, rank, wrap(self.fabric.endpoint(rank)), self.controls[rank], (make_clock or _Clock)())
            for rank in range(num)
        ]
        self.ready = [next(m for m in control.outbox if isinstance(m, Ready)) for control in self.controls]
        self.requests: dict[int, Finished] = {}
        self._home_of: dict[int, int] = {}
        self._random = random.Random(seed)
        self.num_turns = 0
        self.num_steers = 0

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        home: int | None = None,
        sibling_of: int | None = None,
    ) -> int:
        """Send a request to an attention worker (in turn, unless named). Returns its number."""
        request_id = len(self.requests)
        homes = self.config.placement.attention_ranks
        rank = homes[request_id % len(homes)] if home is None else home
        if sibling_of is not None:
            rank = self._home_of[sibling_of]
        self.requests[request_id] = Finished()
        self._home_of[request_id] = rank
        self.controls[rank].inbox.append(AddRequest(request_id, list(prompt), params, sibling_of))
        return request_id

    def abort(self, request_id: int) -> None:
        self.controls[self._home_of[request_id]].inbox.append(AbortRequests([request_id]))

    def turn(self) -> bool:
        """Every worker takes one turn, in random order. True if any had something to do."""
        busy = False
        if self.config.placement.redundant_experts and self.num_turns % 16 == 0:
            self._steer()
        for rank in self._random.sample(range(len(self.workers)), len(self.workers)):
            busy |= self.workers[rank].turn()
            self._collect(rank)
        self.num_turns += 1
        return busy

    def _steer(self) -> None:
        rank = self._random.choice(self.config.placement.attention_ranks)
        shares = random_shares(self._owners, np.random.default_rng(self.num_turns))
        self.controls[rank].inbox.append(Steer(shares.astype("<f4").tobytes()))
        self.num_steers += 1

    def run(self, max_turns: int = 200_000) -> None:
        """Until every request has ended."""
        while any(request.finish_reason is None for request in self.requests.values()):
            if not self.turn():
                self.rest()
            assert self.num_turns < max_turns, "the cluster makes no progress"

    def rest(self) -> None:
        """Nobody has had anything to do. Nothing can come but from here."""

    def settle(self) -> None:
        """Until nothing moves any more."""
        idle = 0
        while idle < 3:
            idle = 0 if self.turn() else idle + 1

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Finished]:
        """All prompts at once, to their end."""
        ids = [self.add(prompt, params) for prompt in prompts]
        self.run()
        return [self.requests[request_id] for request_id in ids]

    def assert_nothing_left(self) -> None:
        """No slot, row or KV block is held, no token waits."""
        self.settle()
        for worker in self.workers:
            assert not worker.core.queues.depth.any()
            batcher = worker.core.batcher
            if batcher is None:
                continue
            batcher.blocks.check()
            assert batcher.blocks.num_used == 0
            assert batcher.slots.num_free == batcher.slots.num_slots
            assert batcher.table.num_free_rows == len(batcher.table.sequences)
            assert not batcher.running
            assert not batcher.waiting
            assert not batcher.members

    def close(self) -> None:
        self.fabric.close()
        for control in self.controls:
            control.close()

    def _collect(self, rank: int) -> None:
        messages, self.controls[rank].outbox = self.controls[rank].outbox, []
        for message in messages:
            assert isinstance(message, self.expected), message
            for output in message.each() if isinstance(message, Outputs) else ():
                request = self.requests[output.request_id]
                assert request.finish_reason is None, "output after the terminal event"
                request.token_ids += output.token_ids
                assert not output.prompt_logprobs or not request.token_ids, "prompts come first"
                request.logprobs += output.logprobs
                request.prompt_logprobs += output.prompt_logprobs
                request.finish_reason = output.finish_reason
                request.error = output.error
                request.num_cached_tokens = max(request.num_cached_tokens, output.num_cached_tokens)
                request.capacity = output.capacity
                request.routed_experts += output.routed_experts
                request.times += [output.times] if output.times is not None else []


class _Clock:
    """Moves on by a step whenever it is read, so that every turn looks at its control channel."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        self._now += 0.002
        return self._now
